"""A penalty on synaptic operations, so that training trades accuracy for fewer spikes.

Shapes: T time steps, N samples, C channels, H rows, W columns.
"""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from multifire.analysis.energy import fan_out
from multifire.nn import MSBlock, PlainBlock, SpikingNetwork

MILLION = 1e6


@contextlib.contextmanager
def count_spikes(network: nn.Module) -> Iterator["SpikeCounter"]:
    """Count the synaptic operations of the network while it runs inside the context, with their gradient."""
    counter = SpikeCounter()
    with contextlib.ExitStack() as stack:
        for module in network.modules():
            if isinstance(module, SpikingNetwork):
                for conv in reading_spikes(module):
                    stack.enter_context(conv.register_forward_hook(counter.after_conv))
            if isinstance(module, PlainBlock) and module.shortcut is None:
                stack.enter_context(module.register_forward_hook(counter.after_identity))
        yield counter


def reading_spikes(network: SpikingNetwork) -> list[nn.Conv2d]:
    """Return the convolutions that read spikes: not the first one, nor the membrane shortcuts, which read currents."""
    others = {network.stem.conv}
    for block in network.modules():
        if isinstance(block, MSBlock) and block.shortcut is not None:
            others.add(block.shortcut.conv)
    return [module for module in network.modules() if isinstance(module, nn.Conv2d) and module not in others]


class SpikeCounter:
    """Forward hooks that add up Σ |input| · fan-out over connections, see `multifire.analysis.energy`."""

    def __init__(self):
        self._sums: list[Tensor] = []

    def after_conv(self, conv: nn.Conv2d, inputs: tuple[Tensor], out: Tensor) -> None:
        x_NCHW = inputs[0]
        fan_out_CHW = fan_out(conv, x_NCHW.shape[2:], out.shape[2:], x_NCHW.device).expand(x_NCHW.shape[1:])
        if x_NCHW.is_contiguous(memory_format=torch.channels_last):  # half the time of sums in another order
            x_NHWC, fan_out_HWC = x_NCHW.permute(0, 2, 3, 1), fan_out_CHW.permute(1, 2, 0)
            self._sums.append(_weighted(x_NHWC, fan_out_HWC))
        else:
            self._sums.append(_weighted(x_NCHW, fan_out_CHW))

    def after_identity(self, _block: nn.Module, inputs: tuple[Tensor], _out: Tensor) -> None:
        self._sums.append(inputs[0].abs().sum(dtype=torch.float32))

    def millions(self) -> Tensor:
        """Return the number of operations of all samples of the batch, in millions."""
        return torch.stack(self._sums).sum() / MILLION


def _weighted(x: Tensor, weights: Tensor) -> Tensor:
    """Return Σ |x|·weights over x [N, ...] and weights [...]."""
    return x.flatten(1).abs().sum(0, dtype=torch.float32) @ weights.reshape(-1).float()
