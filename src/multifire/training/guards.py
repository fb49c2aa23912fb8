"""Everything that may stop a run early: requests, memory, disk, numbers that are not finite, steps that hang."""

import contextlib
import errno
import math
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from multifire.config import TrainOptions
from multifire.config.schema import parse_duration
from multifire.training.meter import DIVERGED, Meter
from multifire.training.resume import save_last
from multifire.training.signals import Interrupted
from multifire.training.state import Training
from multifire.training.step import add_gradients
from multifire.utils.log import log
from multifire.utils.memory import is_out_of_memory

PROCESS_START = time.monotonic()
"""About when the process began: --max-time counts from here."""


class CheckpointTimer:
    """Tells when the next checkpoint within an epoch is due, by steps or by time."""

    def __init__(self, options: TrainOptions):
        every = options.checkpoint_every
        self._steps = int(every) if every.isdecimal() else None
        self._seconds = math.inf if self._steps else parse_duration(every, "checkpoint_every")
        self._since = time.monotonic()

    def is_due(self, step: int) -> bool:
        """Return True if a checkpoint is due after this step of the epoch."""
        if self._steps:
            return step % self._steps == 0
        if time.monotonic() - self._since < self._seconds:
            return False
        self._since = time.monotonic()
        return True


def stop_if_asked(training: Training, where: str) -> None:
    """Raise Interrupted if a signal or --max-time asks for a stop; the last checkpoint must hold the run as it is."""
    exit_code, _ = pending_request(training)
    if exit_code is not None:
        raise Interrupted(f"stopped {where}; {training.run.last} has it: give --resume to go on", exit_code)


def save_and_stop_if_asked(training: Training, meter: Meter, timer: CheckpointTimer, where: str) -> None:
    """Between two steps: write a checkpoint if one is due or requested, then stop if that is requested.

    All processes do the same, whichever of them was asked. A checkpoint always follows the last step of an epoch, so
    that a stop or a crash in the evaluation costs no training.
    """
    requests, position = training.requests, training.position
    is_due = training.processes.is_first and timer.is_due(position.step)
    save = requests.save or position.step == training.steps_per_epoch or is_due
    requests.save = False
    exit_code, save = pending_request(training, save)
    if exit_code is None and not save:
        return
    meter.flush()
    check_weights_finite(training)
    save_last(training)
    if exit_code is not None:
        raise Interrupted(f"stopped {where}; {training.run.last} has it: give --resume to go on", exit_code)


def pending_request(training: Training, save: bool = False) -> tuple[int | None, bool]:
    """Return the exit code to stop with, or None to go on, and whether to save; the same in all processes."""
    requests, limit = training.requests, training.options.max_time
    late = limit is not None and time.monotonic() - PROCESS_START > parse_duration(limit, "max_time")
    interrupt, terminate, late, save = training.processes.any_of(
        [requests.stop == signal.SIGINT, requests.stop == signal.SIGTERM, late, save]
    )
    return 128 + signal.SIGTERM if terminate else 128 + signal.SIGINT if interrupt else 0 if late else None, save


def check_weights_finite(training: Training) -> None:
    """Refuse to save weights that are NaN or infinite. The loss need not show them: a NaN membrane never fires.

    Raises:
        FloatingPointError: names the first such tensor.
    """
    position = training.position
    for name, tensor in training.model.state_dict().items():
        if not torch.isfinite(tensor).all():
            raise FloatingPointError(
                f"{name} holds NaN or infinity at epoch {position.epoch + 1}, step {position.step}; {DIVERGED}"
            )


def check_loss_finite(training: Training, loss: float, split: str) -> None:
    """Raise a FloatingPointError if the loss of an evaluation is NaN or infinite."""
    if not math.isfinite(loss):
        raise FloatingPointError(f"the {split} loss is {loss} after epoch {training.position.epoch + 1}; {DIVERGED}")


@contextlib.contextmanager
def explain_out_of_memory(training: Training, x_TNCHW: Tensor, y: Tensor) -> Iterator[None]:
    """Turn an out-of-memory error of a step into a message that names a batch size that fits.

    Raises:
        MemoryError: with that message.
    """
    try:
        yield
        return
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
    batch = training.cfg.optim.batch_size
    message = f"out of memory with --optim.batch-size {batch}"
    if training.processes.world == 1:
        fitting = next((n for n in halvings(len(y)) if gradients_fit(training, x_TNCHW[:, :n], y[:n])), None)
        if fitting is None:
            raise MemoryError(f"{message}, and not even a single sample fits; choose a smaller network")
        message += (
            f"; {fitting} fit: give --optim.batch-size {fitting}, or "
            f"--optim.accumulate {-(-batch // fitting)}, which computes the batch in parts of that size"
        )
    raise MemoryError(message)


def halvings(samples: int) -> Iterator[int]:
    """Yield samples/2, samples/4, ..., 1."""
    while samples > 1:
        samples //= 2
        yield samples


def gradients_fit(training: Training, x_TNCHW: Tensor, y: Tensor) -> bool:
    """Return True if the gradients of these samples can be computed in the memory there is."""
    training.optimizer.zero_grad(set_to_none=True)
    try:
        add_gradients(training.model, x_TNCHW, y, training.cfg, 1.0)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        return False
    return True


@contextlib.contextmanager
def explain_full_disk(folder: Path) -> Iterator[None]:
    """Turn the error of a full disk into a message that says how the run goes on.

    Raises:
        OSError: with that message.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise OSError(
            f"{error.filename or folder}: {error.strerror}; make room, and --resume goes on from the newest checkpoint"
        ) from None


class Watchdog:
    """Warns if no step finishes for `limit_s` seconds: `with Watchdog() as dog: dog.step_finished("step 12")`."""

    def __init__(self, limit_s: float = 300.0):
        self._limit_s, self._last, self._since = limit_s, "the start", time.monotonic()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._thread.join()

    def step_finished(self, name: str) -> None:
        """Note that the step called `name` is finished."""
        self._last, self._since = name, time.monotonic()

    def _watch(self) -> None:
        warnings = 1
        while not self._over.wait(min(1.0, self._limit_s / 4)):
            waited = time.monotonic() - self._since
            if waited < self._limit_s:
                warnings = 1
            elif waited >= warnings * self._limit_s:
                warnings += 1
                log.warning("nothing finished for %.0f s, since %s; still waiting", waited, self._last)
