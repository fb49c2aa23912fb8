"""Measure how many spikes differ because of bf16.

The spikes of a layer in bf16 are compared with those of the reference backend in bf16, and with those in fp32. The unit
is the neuron-step: one neuron of one sample at one time step. A spike is called moved if the number of spikes of a
neuron-step differs.

Shapes: T time steps, N samples, C channels, H rows, W columns.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from multifire.nn import ConvFire
from multifire.utils.device import autocast


class MovedSpikes(NamedTuple):
    """Figures of one layer in bf16; the last three compare its spikes with those of the reference backend."""

    neuron_steps: int
    """Number of neuron-steps."""
    fire: float
    """Fraction of neuron-steps with at least one spike."""
    kernel: float
    """Fraction that differs from the reference in bf16 with the same input."""
    layer: float
    """Fraction that differs from the reference in fp32 with the same input: the effect of this layer's convolution."""
    network: float
    """Fraction that differs when the whole reference network runs in fp32: the effect of all layers up to this one."""


@torch.no_grad()
def moved_spikes_in_bf16(model: nn.Module, reference: nn.Module, x_TNCHW: Tensor) -> dict[str, MovedSpikes]:
    """Run `model` in bf16 and compare the number of spikes in each layer with the reference backend.

    Args:
        model: the network to measure.
        reference: the same network with the reference backend.
        x_TNCHW: the input of both networks.

    Returns:
        The figures of each layer, by its name.
    """
    spikes_fp32: dict[str, Tensor] = {}
    moved: dict[str, MovedSpikes] = {}

    def save_spikes(name: str, _x: Tensor, options: dict[str, Tensor], out: Tensor) -> None:
        spikes_fp32[name] = _spikes(out, options)

    def compare(name: str, x: Tensor, options: dict[str, Tensor], out: Tensor) -> None:
        reference_layer, spikes = reference.get_submodule(name), _spikes(out, options)
        out_bf16 = reference_layer(x, **options)
        with autocast(x_TNCHW.device, "fp32"):
            out_fp32 = reference_layer(x.float(), **{key: summand.float() for key, summand in options.items()})
        expected = [_spikes(out_bf16, options), _spikes(out_fp32, options), spikes_fp32[name]]
        differences = [_fraction(spikes != other) for other in expected]
        moved[name] = MovedSpikes(spikes.numel(), _fraction(spikes > 0), *differences)

    _run(reference, x_TNCHW, "fp32", save_spikes)
    _run(model, x_TNCHW, "bf16", compare)
    return moved


def _run(model: nn.Module, x_TNCHW: Tensor, precision: str, on_layer: Callable) -> None:
    """Run the network, and call `on_layer(name, input, keyword arguments, output)` after each layer of neurons."""

    def hook(name: str) -> Callable:
        return lambda _module, inputs, options, out: on_layer(name, inputs[0], options, out)

    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, ConvFire)]
    handles = [module.register_forward_hook(hook(name), with_kwargs=True) for name, module in layers]
    with autocast(x_TNCHW.device, precision):
        model(x_TNCHW)
    for handle in handles:
        handle.remove()


def _spikes(out: Tensor, options: dict[str, Tensor]) -> Tensor:
    """Return the spikes of the layer's own neurons: its output without the residual that was added after firing."""
    return out if "add_after" not in options else out - options["add_after"]


def _fraction(condition: Tensor) -> float:
    """Return the fraction of elements that are True."""
    return condition.float().mean(dtype=torch.float64).item()
