"""The moving average of a network's weights."""

import copy
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

Network = TypeVar("Network", bound=nn.Module)


class MovingAverage(Generic[Network]):
    """Moving average of the weights and buffers of a network: w' ← d·w' + (1 - d)·w; the first update copies them.

    torch's AveragedModel does the same, but copies a counter to the device in every update, which a CUDA graph cannot.
    """

    def __init__(self, network: Network, decay: float):
        self.module: Network = copy.deepcopy(network)
        self._network, self._decay = network, decay
        self.is_empty = True
        """True before the first update, which does not use what `module` holds."""

    @torch.no_grad()
    def update(self) -> None:
        """Include the current weights and buffers of the network."""
        averages, values = _tensors(self.module), _tensors(self._network)
        if self.is_empty:
            torch._foreach_copy_(averages, values)
        else:
            torch._foreach_lerp_(averages, values, 1 - self._decay)
        self.is_empty = False


def _tensors(network: nn.Module) -> list[Tensor]:
    return [tensor.detach() for tensor in (*network.parameters(), *network.buffers())]
