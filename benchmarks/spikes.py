"""Which spikes bf16 moves: the kernel's beside the reference's, and a layer's and a network's beside those in fp32.

Shapes: x_TNCHW is [time, sample, channel, row, column].
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from multifire.nn import ConvFire
from multifire.utils.device import autocast


class Moved(NamedTuple):
    """A layer's neuron-steps, and the shares of them that fire and that differ."""

    neuron_steps: int
    fire: float
    kernel: float
    """From the reference in bf16, on the same input."""
    layer: float
    """From the reference in fp32, on the same input: by the rounding of this layer's convolution."""
    network: float
    """From the reference in fp32, on what comes through its network: by all rounding before, too."""


@torch.no_grad()
def moved_in_bf16(model: nn.Module, reference: nn.Module, x_TNCHW: Tensor) -> dict[str, Moved]:
    """Run `model` in bf16 and compare each layer's counts of spikes with those of the same network on the reference."""
    exact: dict[str, Tensor] = {}
    found: dict[str, Moved] = {}

    def keep(name: str, _x: Tensor, options: dict[str, Tensor], out: Tensor) -> None:
        exact[name] = _fired(out, options)

    def compare(name: str, x: Tensor, options: dict[str, Tensor], out: Tensor) -> None:
        layer, fired = reference.get_submodule(name), _fired(out, options)
        again = layer(x, **options)
        with autocast(x_TNCHW.device, "fp32"):
            precise = layer(x.float(), **{key: summand.float() for key, summand in options.items()})
        others = [_fired(again, options), _fired(precise, options), exact[name]]
        found[name] = Moved(fired.numel(), _share(fired > 0), *(_share(fired != other) for other in others))

    _run(reference, x_TNCHW, "fp32", keep)
    _run(model, x_TNCHW, "bf16", compare)
    return found


def _run(model: nn.Module, x_TNCHW: Tensor, precision: str, note: Callable) -> None:
    """Run the network; `note` is told each layer's name, its input, its summands and its output."""

    def hook(name: str) -> Callable:
        return lambda _module, inputs, options, out: note(name, inputs[0], options, out)

    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, ConvFire)]
    handles = [module.register_forward_hook(hook(name), with_kwargs=True) for name, module in layers]
    with autocast(x_TNCHW.device, precision):
        model(x_TNCHW)
    for handle in handles:
        handle.remove()


def _fired(out: Tensor, options: dict[str, Tensor]) -> Tensor:
    """The neurons' own spikes, without what was added to them."""
    return out if "add_after" not in options else out - options["add_after"]


def _share(where: Tensor) -> float:
    return where.float().mean(dtype=torch.float64).item()
