"""Convolution, norm and firing as one layer, and the two residual blocks made of such layers.

tdBN is the threshold-dependent batch norm of `TdBatchNorm2d`.
Shapes: x_TNCHW is [time, sample, channel, row, column].
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from multifire import ops
from multifire.nn.conv import SpikeConv2d
from multifire.nn.neuron import MLF, Stream, Streaming
from multifire.nn.norm import TdBatchNorm2d

MakeNeuron = Callable[[], MLF]


def convolve(conv: nn.Conv2d, x_TNCHW: Tensor) -> Tensor:
    """Convolve every time step; T is folded into the batch."""
    T, N, *shape = x_TNCHW.shape
    out = conv(x_TNCHW.reshape(T * N, *shape))
    return out.reshape(T, N, *out.shape[1:])


def is_static_input(x_TNCHW: Tensor) -> bool:
    """Return True if the input is a still image: one time step, expanded, whose convolution is computed once.

    Never True while torch.export traces: an exported program does not check strides, so it would use the first frame of
    a moving input for all time steps.
    """
    return x_TNCHW.shape[0] > 1 and x_TNCHW.stride(0) == 0 and not torch.compiler.is_exporting()


def make_conv(in_channels: int, out_channels: int, kernel: int, stride: int) -> nn.Conv2d:
    """Return a convolution without bias whose output is H × W divided by the stride.

    Weights start from `kaiming_normal_` and lie in channels-last memory.
    """
    conv = SpikeConv2d(in_channels, out_channels, kernel, stride, padding=kernel // 2, bias=False)
    nn.init.kaiming_normal_(conv.weight)
    conv.weight.data = conv.weight.data.contiguous(memory_format=torch.channels_last)
    return conv


class ConvNorm(nn.Module):
    """y = tdBN(conv(x)), [T, N, C, H, W]: the shortcut of a plain block, added to the current of its second neurons.

    Threshold and backend of the norm are those of `neuron`, which does not fire here.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel: int, stride: int, neuron: MLF):
        super().__init__()
        self.conv = make_conv(in_channels, out_channels, kernel, stride)
        self.norm = TdBatchNorm2d(out_channels, v_threshold=neuron.initial_thresholds[0], backend=neuron.backend)

    def forward(self, x_TNCHW: Tensor) -> Tensor:
        return self.norm(convolve(self.conv, x_TNCHW))


class ConvFire(Streaming):
    """Convolution, norm and neurons: o = MLF(tdBN(conv(x)) + add_before) + add_after, [T, N, C, H, W].

    A residual block passes its shortcut as `add_before` or `add_after`. One fused op computes norm, sums and firing:
    `norm` and `neuron` hold its parameters and options, and their own `forward` is not called. For the backward pass
    the op keeps conv(x) and `add_before`, from which it computes the membranes again; the convolution keeps x as
    packed integers (`SpikeConv2d`).
    """

    def __init__(self, in_channels: int, out_channels: int, kernel: int, stride: int, neuron: MLF):
        super().__init__()
        self.conv = make_conv(in_channels, out_channels, kernel, stride)
        self.norm = TdBatchNorm2d(out_channels, v_threshold=neuron.initial_thresholds[0])
        self.neuron = neuron

    def forward(
        self,
        x_TNCHW: Tensor,
        stream: Stream | None = None,
        *,
        add_before: Tensor | None = None,
        add_after: Tensor | None = None,
    ) -> Tensor:
        if x_TNCHW.dim() != 5:
            raise ValueError(
                f"x has shape {tuple(x_TNCHW.shape)}, expected [T, N, C, H, W]; a single frame goes through step()"
            )
        if stream is not None and self.training:
            raise ValueError("batch statistics need all time steps at once; call model.eval() before step()")
        timesteps = x_TNCHW.shape[0]
        if is_static_input(x_TNCHW):
            x_TNCHW = x_TNCHW[:1]
        spikes, state = ops.tdbn_mlf(
            convolve(self.conv, x_TNCHW),
            *self.norm.tensors(),
            **self.norm.options(),
            **self.neuron.options(),
            add_before=add_before,
            add_after=add_after,
            state=stream and stream.take(self),
            return_state=stream is not None,
            timesteps=timesteps,
        )
        if stream is not None and state is not None:
            stream.put(self, state)
        return spikes


class DSBlock(Streaming):
    """Dormant-suppressed residual block: o = MLF(F₂(MLF(F₁(x)))) + shortcut(x), F = tdBN∘conv3×3.

    x and o are [T, N, C, H, W]. The shortcut is x or, if shapes change, MLF(tdBN(conv1×1)). It is added after firing,
    so that the gradient reaches earlier blocks even where the block's own neurons are dormant. Activations stay
    integers: each block adds at most K.

    Source: Feng et al., IJCAI 2022, section 3.3.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1, make_neuron: MakeNeuron = MLF):
        super().__init__()
        self.fire1 = ConvFire(in_channels, out_channels, 3, stride, make_neuron())
        self.fire2 = ConvFire(out_channels, out_channels, 3, 1, make_neuron())
        same = in_channels == out_channels and stride == 1
        self.shortcut = None if same else ConvFire(in_channels, out_channels, 1, stride, make_neuron())

    def forward(self, x_TNCHW: Tensor, stream: Stream | None = None) -> Tensor:
        residual = x_TNCHW if self.shortcut is None else self.shortcut(x_TNCHW, stream)
        return self.fire2(self.fire1(x_TNCHW, stream), stream, add_after=residual)


class PlainBlock(Streaming):
    """Plain residual block: o = MLF(F₂(MLF(F₁(x))) + shortcut(x)), F = tdBN∘conv3×3.

    x and o are [T, N, C, H, W]. The shortcut is x or, if shapes change, tdBN(conv1×1). It is added before firing, as in
    earlier spiking ResNets.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1, make_neuron: MakeNeuron = MLF):
        super().__init__()
        self.fire1 = ConvFire(in_channels, out_channels, 3, stride, make_neuron())
        self.fire2 = ConvFire(out_channels, out_channels, 3, 1, make_neuron())
        same = in_channels == out_channels and stride == 1
        self.shortcut = None if same else ConvNorm(in_channels, out_channels, 1, stride, self.fire2.neuron)

    def forward(self, x_TNCHW: Tensor, stream: Stream | None = None) -> Tensor:
        residual = x_TNCHW if self.shortcut is None else self.shortcut(x_TNCHW)
        return self.fire2(self.fire1(x_TNCHW, stream), stream, add_before=residual)


# A block is a Streaming module, built as block(in_channels, out_channels, stride, make_neuron). Its forward(x, stream)
# passes the stream to every layer of neurons.
BLOCKS = {"ds": DSBlock, "plain": PlainBlock}
