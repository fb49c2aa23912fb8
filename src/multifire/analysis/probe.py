"""Run a network for a measurement without changing it."""

import contextlib
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from multifire.nn import TdBatchNorm2d
from multifire.utils.device import autocast

Pairs = Iterable[tuple[Tensor, Tensor]]
"""Batches x [T, N, C, H, W] and labels y [N]."""


@contextlib.contextmanager
def undisturbed(model: nn.Module, training: bool | None = None) -> Iterator[None]:
    """Set training or evaluation mode (None: unchanged), and restore modes and running statistics afterwards.

    Norms use the statistics of this process's samples only, since the other processes do not take part.
    """
    modes = [(module, module.training) for module in model.modules()]
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    norms = [(norm, norm.sync) for norm in model.modules() if isinstance(norm, TdBatchNorm2d)]
    try:
        for norm, _ in norms:
            norm.sync = False
        if training is not None:
            model.train(training)
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        for norm, sync in norms:
            norm.sync = sync
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)


@torch.no_grad()
def run(model: nn.Module, batches: Pairs, precision: str) -> int:
    """Run the model on the batches and return the number of samples.

    Raises:
        ValueError: no sample.
    """
    samples = 0
    for x_TNCHW, _ in batches:
        with autocast(x_TNCHW.device, precision):
            model(x_TNCHW)
        samples += x_TNCHW.shape[1]
    require_samples(samples)
    return samples


def require_samples(samples: int) -> None:
    if samples == 0:
        raise ValueError("there is no sample to measure on; pass at least one batch (x [T, N, C, H, W], y [N])")
