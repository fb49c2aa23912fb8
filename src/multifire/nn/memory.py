"""What training keeps between forward and backward."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from multifire.nn.block import ConvFire


class Kept(NamedTuple):
    """Bytes that autograd holds after a forward pass, without the parameters, and how many neuron-steps they serve."""

    bytes: int
    neuron_steps: int

    @property
    def bytes_per_neuron_step(self) -> float:
        return self.bytes / self.neuron_steps


def kept_for_backward(model: nn.Module, x_TNCHW: Tensor) -> Kept:
    """Run `model` forward and count what autograd keeps of it; call it inside the autocast that training uses.

    A neuron-step is one neuron of one sample at one time step.
    """
    own = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers())}
    # The tensors themselves, so that no address is used twice while they are counted.
    storages: dict[int, torch.UntypedStorage] = {}
    neurons = 0

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage
        return tensor

    def count(_module: nn.Module, _inputs: tuple, spikes: Tensor) -> None:
        nonlocal neurons
        neurons += spikes.numel()

    handles = [module.register_forward_hook(count) for module in model.modules() if isinstance(module, ConvFire)]
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            out = model(x_TNCHW)
    finally:
        for handle in handles:
            handle.remove()
    del out
    return Kept(sum(storage.nbytes() for storage in storages.values()), neurons)
