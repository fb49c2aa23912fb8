"""Fold the norms of a trained network into its convolutions, for evaluation.

With running statistics, tdBN is a scale and a shift per channel; both move into the convolution before it:

    γ·(s·(w∗x - μ)) + β = (γ·s·w)∗x + (β - γ·s·μ),   s = α·V_th / (sqrt(σ²) + ε)

Shapes: T time steps, N samples, C channels, I input channels, O output channels, H rows, W columns.
"""

import copy

from torch import Tensor, nn

from multifire import ops
from multifire.nn import ConvFire, ConvNorm, SpikingNetwork, Stream, Streaming, TdBatchNorm2d
from multifire.nn.block import convolve, is_static_input


class FoldedFire(Streaming):
    """A ConvFire whose norm is folded into its convolution, [T, N, C, H, W].

    o = MLF(conv(x) + bias + add_before) + add_after
    """

    def __init__(self, layer: ConvFire):
        super().__init__()
        self.conv = fold_norm(layer.conv, layer.norm)
        self.neuron = layer.neuron

    def forward(
        self,
        x_TNCHW: Tensor,
        stream: Stream | None = None,
        *,
        add_before: Tensor | None = None,
        add_after: Tensor | None = None,
    ) -> Tensor:
        timesteps = x_TNCHW.shape[0]
        if is_static_input(x_TNCHW):
            x_TNCHW = x_TNCHW[:1]
        spikes, state = ops.tdbn_mlf(
            convolve(self.conv, x_TNCHW),
            *(None, None, None, None),  # no norm
            training=False,
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


class Shift(nn.Module):
    """Subtract the mean of an input norm from x [T, N, C, H, W]: y = x - mean per channel.

    Its scale is folded into the stem's weights.
    The shift cannot move into a bias: the stem pads with zeros after the norm, so a bias would be wrong at the borders.
    """

    def __init__(self, mean: Tensor):
        super().__init__()
        self.mean: Tensor
        self.register_buffer("mean", mean)

    def forward(self, x_TNCHW: Tensor) -> Tensor:
        return x_TNCHW - self.mean.view(-1, 1, 1)


def fold(model: SpikingNetwork) -> SpikingNetwork:
    """Return a copy of the network for evaluation, with its norms folded into its convolutions; it computes the same.

    Every ConvFire becomes a FoldedFire, a plain block's shortcut becomes a convolution with a bias, and an input norm
    becomes a Shift. Folded weights are computed in float64 and stored in the network's type.

    Raises:
        ValueError: the network is already folded.
    """
    if not any(isinstance(module, ConvFire) for module in model.modules()):
        raise ValueError("the network has no norm to fold; expected one that is not folded yet")
    folded = copy.deepcopy(model)
    if isinstance(folded.input_norm, TdBatchNorm2d):
        weight = folded.stem.conv.weight
        scale_I11 = scale_and_shift(folded.input_norm)[0].view(-1, 1, 1)
        weight.data = (weight.double() * scale_I11).to(weight.dtype)
        folded.add_module("input_norm", Shift(folded.input_norm.running_mean))
    for parent in list(folded.modules()):
        for name, child in parent.named_children():
            if isinstance(child, ConvFire):
                setattr(parent, name, FoldedFire(child))
            elif isinstance(child, ConvNorm):
                child.conv = fold_norm(child.conv, child.norm)
                child.add_module("norm", nn.Identity())
    return folded.eval().requires_grad_(False)


def fold_norm(conv: nn.Conv2d, norm: TdBatchNorm2d) -> nn.Conv2d:
    """Return a convolution with a bias that computes what norm(conv(x)) computes in evaluation."""
    assert conv.bias is None
    scale_O, shift_O = scale_and_shift(norm)
    folded = copy.deepcopy(conv)
    folded.weight.data = (conv.weight.detach().double() * scale_O.view(-1, 1, 1, 1)).to(conv.weight.dtype)
    folded.bias = nn.Parameter(shift_O.to(conv.weight.dtype))
    return folded


def scale_and_shift(norm: TdBatchNorm2d) -> tuple[Tensor, Tensor]:
    """Return the norm's scale and shift per channel in evaluation, y = scale·x + shift, in float64."""
    scale = ops.reference.norm_factor(norm.running_var.double(), norm.eps, norm.alpha * norm.v_threshold)
    if norm.weight is not None:
        scale = scale * norm.weight.detach().double()
    shift = -norm.running_mean.double() * scale
    return scale, shift if norm.bias is None else shift + norm.bias.detach().double()
