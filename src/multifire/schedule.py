"""Learning rate as a function of the step alone, so that nothing of it need be stored or restored."""

import math

from multifire.config import OptimConfig

ONE_CYCLE_START, ONE_CYCLE_END = 1 / 25, 1e-4
"""Share of the highest rate at which the one-cycle schedule begins and ends."""


def learning_rate(optim: OptimConfig, step: int, steps_per_epoch: int) -> float:
    """Rate of training step number `step`, counted from 0 over the whole run."""
    share = step / (optim.epochs * steps_per_epoch)
    rising = min(1.0, (step + 1) / max(1.0, optim.warmup_epochs * steps_per_epoch))
    if optim.schedule == "step":
        return rising * optim.lr * optim.gamma ** (step // steps_per_epoch // optim.step_epochs)
    if optim.schedule == "cosine":
        return rising * optim.lr * _cosine(1.0, 0.0, share)
    if share < optim.warmup_share:
        return optim.lr * _cosine(ONE_CYCLE_START, 1.0, share / optim.warmup_share)
    return optim.lr * _cosine(1.0, ONE_CYCLE_END, (share - optim.warmup_share) / (1 - optim.warmup_share))


def _cosine(start: float, end: float, share: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * share)) / 2
