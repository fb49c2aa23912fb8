"""Run a network for a measurement and restore its state afterwards.

Shapes: T time steps, N samples, C channels, H height, W width.
"""

import contextlib
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from multifire.nn import MLF, ConvFire, TdBatchNorm2d
from multifire.utils.device import autocast

LabelledBatches = Iterable[tuple[Tensor, Tensor]]
"""Batches (x [T, N, C, H, W], labels y [N])."""


@contextlib.contextmanager
def preserve_state(model: nn.Module, training: bool | None = None) -> Iterator[None]:
    """Restore the model's modes and buffers on exit, and switch off the synchronisation of its norms until then.

    The norms are not synchronised, because the other processes do not take part in the measurement.

    Args:
        model: any network.
        training: mode inside the context; None: keep the mode of each module.
    """
    saved_modes = [(module, module.training) for module in model.modules()]
    saved_buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    saved_syncs = [(norm, norm.sync) for norm in model.modules() if isinstance(norm, TdBatchNorm2d)]
    try:
        for norm, _ in saved_syncs:
            norm.sync = False
        if training is not None:
            model.train(training)
        yield
    finally:
        for module, mode in saved_modes:
            module.training = mode
        for norm, sync in saved_syncs:
            norm.sync = sync
        with torch.no_grad():
            for buffer, saved in saved_buffers:
                buffer.copy_(saved)


def layers_of_neurons(model: nn.Module) -> dict[str, ConvFire | MLF]:
    """Return the layers whose output is spikes, by name: neurons with their convolution and norm, or alone."""
    fused = {module.neuron for module in model.modules() if isinstance(module, ConvFire)}
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, (ConvFire, MLF)) and module not in fused
    }


@torch.no_grad()
def run_batches(model: nn.Module, batches: LabelledBatches, precision: str) -> int:
    """Run the model on all batches and return the number of samples.

    Args:
        model: any network.
        batches: the labels are not used.
        precision: "bf16" runs convolutions under autocast.

    Raises:
        ValueError: there is no sample.
    """
    samples = 0
    for x_TNCHW, _ in batches:
        with autocast(x_TNCHW.device, precision):
            model(x_TNCHW)
        samples += x_TNCHW.shape[1]
    require_samples(samples)
    return samples


def require_samples(samples: int) -> None:
    """Raise a ValueError if the number of samples is 0."""
    if samples == 0:
        raise ValueError("there is no sample to measure on; pass at least one batch (x [T, N, C, H, W], y [N])")
