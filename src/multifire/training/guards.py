"""Handle what can stop a run early: requests, lack of memory or disk space, NaN and infinity, steps that hang."""

import contextlib
import math
import signal
import threading
import time
from collections.abc import Iterator
from typing import Self

import torch
from torch import Tensor

from multifire.config import TrainOptions
from multifire.config.schema import parse_duration
from multifire.training.meter import DIVERGED, Meter
from multifire.training.resume import save_last
from multifire.training.signals import Interrupted
from multifire.training.state import Training
from multifire.training.step import forward_backward, targets
from multifire.utils.log import log
from multifire.utils.memory import is_out_of_memory

PROCESS_START = time.monotonic()
"""Time at which this module was imported, shortly after the process began; --max-time counts from it."""


class CheckpointTimer:
    """Decides when the next checkpoint within an epoch is due, by steps or by time."""

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
    """Raise Interrupted if a signal or --max-time asks for a stop. Call it when the last checkpoint is up to date."""
    exit_code, _ = pending_request(training)
    if exit_code is not None:
        raise interrupted(training, where, exit_code)


def save_and_stop_if_asked(training: Training, meter: Meter, timer: CheckpointTimer, where: str) -> None:
    """Between two steps, write a checkpoint if one is due or requested, then stop if a stop is requested.

    All processes do the same, even if only one of them received the signal. A checkpoint always follows the last step
    of an epoch, so that a stop or a crash in the evaluation costs no training.
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
        raise interrupted(training, where, exit_code)


def interrupted(training: Training, where: str, exit_code: int) -> Interrupted:
    """Return the exception that stops the run; it names the checkpoint."""
    return Interrupted(f"stopped {where}; checkpoint: {training.run.last}; give --resume to continue", exit_code)


def pending_request(training: Training, save: bool = False) -> tuple[int | None, bool]:
    """Return the exit code to stop with (None: do not stop), and True if a checkpoint is requested.

    The answer is the same in all processes.
    """
    requests, limit = training.requests, training.options.max_time
    time_is_up = limit is not None and time.monotonic() - PROCESS_START > parse_duration(limit, "max_time")
    interrupt, terminate, time_is_up, save = training.processes.any_of(
        [requests.stop == signal.SIGINT, requests.stop == signal.SIGTERM, time_is_up, save]
    )
    if terminate:
        return 128 + signal.SIGTERM, save
    if interrupt:
        return 128 + signal.SIGINT, save
    return 0 if time_is_up else None, save


def check_weights_finite(training: Training) -> None:
    """Raise an error if a weight or buffer is NaN or infinite. The loss may stay finite: a NaN membrane never fires.

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
            raise MemoryError(f"{message}, and a single sample does not fit either; choose a smaller network")
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
    """Return True if the memory suffices to compute the gradients of these samples."""
    training.optimizer.zero_grad(set_to_none=True)
    try:
        forward_backward(training.model, x_TNCHW, targets(y, training.cfg), training.cfg, 1.0)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        return False
    return True


class Watchdog:
    """Warns if no step finishes for `limit_s` seconds: `with Watchdog() as watchdog: watchdog.progress("step 12")`."""

    def __init__(self, limit_s: float = 300.0):
        self._limit_s, self._last_step, self._since = limit_s, "the start", time.monotonic()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()

    def progress(self, name: str) -> None:
        """Restart the time limit: the step or batch called `name` is finished."""
        self._last_step, self._since = name, time.monotonic()

    def _watch(self) -> None:
        warnings = 1
        while not self._stop.wait(min(1.0, self._limit_s / 4)):
            waited = time.monotonic() - self._since
            if waited < self._limit_s:
                warnings = 1
            elif waited >= warnings * self._limit_s:
                warnings += 1
                log.warning("no step has finished for %.0f s, since %s; still waiting", waited, self._last_step)
