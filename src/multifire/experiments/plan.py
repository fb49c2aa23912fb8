"""Estimate the time, memory and disk space of a run from a few training steps on random images."""

import time
from dataclasses import dataclass
from statistics import median

from multifire import datasets
from multifire.config import RunConfig
from multifire.experiments.bench import Network, alternate, peak_in_own_process
from multifire.nn import kept_for_backward
from multifire.training.optim import moments_of
from multifire.utils.device import autocast, pick_device

STEPS = 3


@dataclass(frozen=True)
class Plan:
    """Estimates of a run: sizes in bytes, times in seconds."""

    parameters: int
    steps_per_epoch: int
    step_seconds: float
    epoch_seconds: float
    """Training steps and the evaluation of one epoch."""
    start_seconds: float
    """Starting a process, building the network, and doing the first steps."""
    run_seconds: float
    kept_bytes: int
    """Kept by autograd between forward and backward pass."""
    peak_bytes: int | None
    """Peak of a training step, without the interpreter's memory."""
    checkpoint_bytes: int


def plan(cfg: RunConfig) -> Plan:
    """Train and evaluate the network of `cfg` on a few random batches, and extrapolate to the whole run."""
    device = pick_device(cfg.device)
    cfg, info = datasets.describe_run(cfg)
    network = Network(cfg, device)
    timed = alternate({"train": network.step, "evaluate": network.evaluate}, STEPS, device)
    step_seconds, evaluation_seconds = median(timed["train"]), median(timed["evaluate"])
    with autocast(device, cfg.precision):
        kept = kept_for_backward(network.model.train(), network.x_TNCHW)
    start = time.perf_counter()
    peak = peak_in_own_process(cfg)
    start_seconds = time.perf_counter() - start
    train, test = info.published_sizes if any(info.published_sizes) else _counted(cfg)
    held_out = int(train * cfg.data.validation)
    steps = _batches(min(train - held_out, cfg.data.limit or train), cfg)
    epoch_seconds = steps * step_seconds + _batches(held_out or test, cfg) * evaluation_seconds
    moment_bytes = moments_of(cfg.optim) * sum(p.nbytes for p in network.model.parameters())
    state_bytes = sum(tensor.nbytes for tensor in network.model.state_dict().values())
    state_copies = 2 if cfg.optim.ema_decay is not None else 1
    return Plan(
        parameters=sum(p.numel() for p in network.model.parameters()),
        steps_per_epoch=steps,
        step_seconds=step_seconds,
        epoch_seconds=epoch_seconds,
        start_seconds=start_seconds,
        run_seconds=start_seconds + cfg.optim.epochs * epoch_seconds,
        kept_bytes=kept.bytes,
        peak_bytes=peak,
        checkpoint_bytes=moment_bytes + state_copies * state_bytes,
    )


def _counted(cfg: RunConfig) -> tuple[int, int]:
    """Return the number of training and test samples of own data, of which nothing is published."""
    data = datasets.load(cfg.data.name, cfg.data.root, cfg.data)
    return len(data.train), len(data.test)


def _batches(samples: int, cfg: RunConfig) -> int:
    """Return the number of batches of the training batch size that hold these samples."""
    return -(-samples // cfg.optim.batch_size)
