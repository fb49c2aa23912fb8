"""Part 4, epoch: epochs by the loop of `multifire train`, and the host's time for a step beside a replay's."""

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.cases import Case
from benchmarks.gpu_parts.clock import alternate, expect_captures, synchronize
from benchmarks.gpu_parts.setting import NETWORK, Item, Setting, describe
from multifire.config import RunConfig, TrainOptions
from multifire.datasets.images import CIFAR_SUBFOLDER, CIFAR_TEST, CIFAR_TRAIN
from multifire.training.distributed import process_group
from multifire.training.guards import Watchdog
from multifire.training.loop import finish_epoch, score, train_epoch
from multifire.training.messages import TrainingBar
from multifire.training.signals import catch_signals
from multifire.training.state import Training, open_run_folder, set_up

COLUMNS = (*NETWORK, "data", "epoch", "what", "samples", "seconds", "samples_per_s", "train_loss", "accuracy")
RECORD = 1 + 3 * 32 * 32
"""Bytes of a labelled image in CIFAR-10's files."""


def items(setting: Setting) -> list[Item]:
    """One item for each network that learns images."""
    guess = 35 if setting.on_gpu else 4
    return [
        Item(f"{recipe}, {epochs} epochs", guess, partial(run, setting.case(recipe, 128), epochs, setting))
        for recipe, epochs in (("cifar10", 3 if setting.on_gpu else 2), ("cifar10-small", 2))
    ]


def run(case: Case, epochs: int, setting: Setting) -> Iterator[dict[str, Any]]:
    """Train epochs; the first one includes warm-up and capture."""
    with tempfile.TemporaryDirectory() as folder:
        root, data = setting.root, "CIFAR-10 (--root)"
        if root is None:
            root, data = Path(folder) / "data", "random images"
            write_random_images(root / CIFAR_SUBFOLDER, 10_000 if setting.on_gpu else 4)
        cfg = _config(case, epochs, root, setting)
        row = describe(replace(case, cfg=cfg, size=32)) | {"data": data}
        with expect_captures():
            yield from (row | figures for figures in _train(cfg, Path(folder) / "run", setting))


def _config(case: Case, epochs: int, root: Path, setting: Setting) -> RunConfig:
    cfg = replace(case.cfg, device=setting.device.type)
    return replace(
        cfg,
        data=replace(cfg.data, root=str(root)),
        optim=replace(cfg.optim, epochs=epochs, schedule="one-cycle"),
    )


def write_random_images(folder: Path, samples: int) -> None:
    """Write random images in the layout of CIFAR-10."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name in (*CIFAR_TRAIN, CIFAR_TEST):
        records = rng.integers(0, 256, (samples, RECORD), dtype=np.uint8)
        records[:, 0] %= 10
        (folder / name).write_bytes(records.tobytes())


def _train(cfg: RunConfig, out: Path, setting: Setting) -> Iterator[dict[str, Any]]:
    """Do what `multifire.train` does, and yield the times of each epoch, then those of a step."""
    with ExitStack() as stack:
        requests, processes = stack.enter_context(catch_signals()), stack.enter_context(process_group())
        training = set_up(cfg, out, TrainOptions(), processes, requests)
        stack.enter_context(open_run_folder(training))
        bar, watchdog = stack.enter_context(TrainingBar(training)), stack.enter_context(Watchdog())
        train, test = (batches.order.samples for batches in (training.batches.train, training.batches.selection))
        while not training.is_finished:
            position, epoch = training.position, training.position.epoch + 1
            trained = _seconds(lambda: train_epoch(training, bar, watchdog), setting)
            loss = position.loss_sum / max(1, position.seen)
            scored: list[Any] = []
            evaluated = _seconds(lambda: scored.append(score(training, bar, watchdog)), setting)  # noqa: B023
            rest = _seconds(lambda: finish_epoch(training, bar, watchdog), setting)
            accuracy = {"train_loss": loss, "accuracy": scored[0].accuracy}
            for what, samples, seconds in (
                ("training", train, trained),
                ("evaluation", test, evaluated),
                ("training and evaluation", train, trained + evaluated),
                ("the same with analysis and checkpoints", train, trained + rest),  # `rest` evaluates again
            ):
                row = {"epoch": epoch, "what": what, "samples": samples, "seconds": seconds}
                yield row | accuracy | {"samples_per_s": samples / seconds}
        yield from _times_of_a_step(training, bar, watchdog, setting)


def _times_of_a_step(
    training: Training, bar: TrainingBar, watchdog: Watchdog, setting: Setting
) -> Iterator[dict[str, Any]]:
    """Yield two times: of one replay, and of the host's work between two replays (an epoch without its steps)."""
    x_TNCHW, y = next(iter(training.batches.train.epoch(0)))
    result = training.do_step(x_TNCHW, y, len(y))
    replay = alternate({"step": lambda: training.do_step(x_TNCHW, y, len(y))}, setting)["step"].device
    do_step, training.do_step = training.do_step, lambda *_: result  # pyright: ignore[reportAttributeAccessIssue]
    training.position.step = 0
    host = _seconds(lambda: train_epoch(training, bar, watchdog), setting) / training.steps_per_epoch
    training.do_step = do_step
    for what, seconds in (("a replay", sorted(replay)[len(replay) // 2]), ("the host between two replays", host)):
        yield {"what": what, "samples": len(y), "seconds": seconds, "samples_per_s": len(y) / seconds}


def _seconds(call: Callable[[], Any], setting: Setting) -> float:
    synchronize(setting)
    start = time.perf_counter()
    call()
    synchronize(setting)
    return time.perf_counter() - start
