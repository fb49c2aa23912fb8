"""Count the memory that training keeps between the forward and the backward pass."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from multifire.nn.block import ConvFire
from multifire.nn.norm import TdBatchNorm2d

KINDS = {"convolutions": (nn.Conv2d,), "neurons and norms": (ConvFire, TdBatchNorm2d)}
"""Kinds of layer and their module types; everything else is "the rest"."""


class Kept(NamedTuple):
    """Bytes that autograd keeps after a forward pass, without parameters, and the number of neuron-steps."""

    by_kind: dict[str, int]
    """Bytes by the kind of layer that saved them first: a convolution saves its input."""
    neuron_steps: int

    @property
    def bytes(self) -> int:
        return sum(self.by_kind.values())

    @property
    def bytes_per_neuron_step(self) -> float:
        return self.bytes / self.neuron_steps


def kept_for_backward(model: nn.Module, x_TNCHW: Tensor) -> Kept:
    """Run `model` forward on x [T, N, C, H, W] and count the bytes that autograd keeps for the backward pass.

    Call it inside the autocast that training uses. A neuron-step is one neuron of one sample at one time step.
    """
    parameter_storages = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers())}
    # Holding the storages keeps their addresses from being reused while they are counted.
    storages: dict[int, torch.UntypedStorage] = {}
    by_kind = dict.fromkeys([*KINDS, "the rest"], 0)
    within = ["the rest"]
    neurons = 0

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameter_storages and storage.data_ptr() not in storages:
            storages[storage.data_ptr()] = storage
            by_kind[within[-1]] += storage.nbytes()
        return tensor

    def count(_module: nn.Module, _inputs: tuple, spikes: Tensor) -> None:
        nonlocal neurons
        neurons += spikes.numel()

    def enter(kind: str) -> Callable[..., None]:
        return lambda *_: within.append(kind)

    def leave(*_) -> None:
        within.pop()

    handles = [module.register_forward_hook(count) for module in model.modules() if isinstance(module, ConvFire)]
    for kind, types in KINDS.items():
        for module in (module for module in model.modules() if isinstance(module, types)):
            handles += [module.register_forward_pre_hook(enter(kind)), module.register_forward_hook(leave)]
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            out = model(x_TNCHW)
    finally:
        for handle in handles:
            handle.remove()
    del out
    return Kept(by_kind, neurons)
