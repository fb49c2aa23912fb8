"""The residual blocks with which the field compares: membrane shortcuts and spike-element-wise shortcuts.

Shapes: x_TNCHW is [time, sample, channel, row, column].
"""

from torch import Tensor

from multifire.nn.block import ConvFire, ConvNorm, DSBlock, MakeNeuron
from multifire.nn.neuron import MLF, Stream, Streaming


class MSBlock(Streaming):
    """Membrane-shortcut block: y = shortcut(x) + F₂(MLF(F₁(MLF(x)))), F = tdBN∘conv3×3.

    x and y are currents [T, N, C, H, W]. The shortcut is x or, if shapes change, tdBN(conv1×1). No neuron lies on it,
    so that currents reach later blocks unchanged; a network of such blocks ends with neurons.

    Source: Hu et al., "Advancing spiking neural networks toward deep residual learning", TNNLS 2024.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1, make_neuron: MakeNeuron = MLF):
        super().__init__()
        self.fire1 = make_neuron()
        self.fire2 = ConvFire(in_channels, out_channels, 3, stride, make_neuron())
        self.conv = ConvNorm(out_channels, out_channels, 3, 1, self.fire2.neuron)
        same = in_channels == out_channels and stride == 1
        self.shortcut = None if same else ConvNorm(in_channels, out_channels, 1, stride, self.fire1)

    def forward(self, x_TNCHW: Tensor, stream: Stream | None = None) -> Tensor:
        residual = x_TNCHW if self.shortcut is None else self.shortcut(x_TNCHW)
        spikes = self.fire2(self.fire1(x_TNCHW, stream), stream)
        return residual + self.conv(spikes)


class SEWBlock(DSBlock):
    """Spike-element-wise block with addition: o = MLF(F₂(MLF(F₁(x)))) + shortcut(x), F = tdBN∘conv3×3.

    x and o are [T, N, C, H, W]. It is the dormant-suppressed block; the two differ by their neurons: SEW networks have
    ordinary ones, K = 1.

    Source: Fang et al., "Deep residual learning in spiking neural networks", NeurIPS 2021.
    """
