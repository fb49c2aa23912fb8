"""A convolution that keeps its input spikes in a few bits each for the backward pass."""

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from multifire import ops


class SpikeConv2d(nn.Conv2d):
    """nn.Conv2d that keeps an input of small integers in 2, 4 or 8 bits each for the backward pass.

    Spikes and sums of spikes are such integers. On a CPU the pass that packs them checks every value: an input that
    does not fit is kept unpacked, which costs memory but never a wrong gradient. On a GPU nothing is checked: inputs
    are packed only with a `max_input`, and they must keep to it.
    """

    max_input: int | None = None
    """Largest of the integers 0, 1, 2, ... that an input may hold; None: unknown. The network's builder sets it."""
    bits = 2  # bits of the last input, with which packing the next one starts

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        packs, picks = self._packs_input(input, weight, bias), reads_single_pixels(self)
        stride = (1, 1) if picks else self.stride
        if not packs:
            if picks:
                return F.conv2d(pick_pixels(input, self.stride), weight, bias, stride, groups=self.groups)
            return super()._conv_forward(input, weight, bias)
        if torch.is_autocast_enabled(input.device.type):
            input = input.to(torch.get_autocast_dtype(input.device.type))
        if picks:
            input = cast(Tensor, _PickPixels.apply(input, self.stride))
        packed = ops.pack_spikes(input, self.bits, self.max_input)
        if packed is None:
            return F.conv2d(input, weight.to(input.dtype), None, stride, self.padding, self.dilation)
        self.bits = packed.bits
        return _Convolve.apply(input, weight, packed, stride, self.padding, self.dilation)

    def _packs_input(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
        """Return True in training. A compiled graph chooses itself what to keep; torch reports mismatched types."""
        simple = (
            bias is None and self.groups == 1 and self.padding_mode == "zeros" and not isinstance(self.padding, str)
        )
        learns = torch.is_grad_enabled() and weight.requires_grad
        fits = torch.is_autocast_enabled(input.device.type) or input.dtype == weight.dtype
        return simple and learns and fits and not torch.compiler.is_compiling()


def reads_single_pixels(conv: nn.Conv2d) -> bool:
    """Return True for a strided 1×1 convolution, which is computed as a dense one of the pixels that it reads.

    On processors with AVX2 but without AVX-512, oneDNN in torch 2.13 computes the strided one wrongly for some numbers
    of channels: the int8 version returns wrong sums, and the fp32 weight gradient writes past its memory.
    """
    return conv.kernel_size == (1, 1) and conv.padding == (0, 0) and conv.stride != (1, 1)


def pick_pixels(x_NCHW: Tensor, stride: Sequence[int]) -> Tensor:
    """Return the pixels that a 1×1 convolution of this stride reads: every stride-th row and column."""
    return x_NCHW[:, :, :: stride[0], :: stride[1]]


class _PickPixels(torch.autograd.Function):
    """`pick_pixels` in training, whose result and gradient keep x's memory order.

    The gradient of a plain slice is contiguous even where x is channels-last, and takes ten times as long to add to
    the other gradients of x.
    """

    @staticmethod
    def forward(x, stride):
        return pick_pixels(x, stride).contiguous(memory_format=_order(x))

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, ctx.stride = inputs
        ctx.shape, ctx.order = x.shape, _order(x)

    @staticmethod
    def backward(ctx, *grads):
        (grad,) = grads
        grad_x = torch.empty(ctx.shape, dtype=grad.dtype, device=grad.device, memory_format=ctx.order).zero_()
        grad_x[:, :, :: ctx.stride[0], :: ctx.stride[1]] = grad
        return grad_x, None


def _order(x: Tensor) -> torch.memory_format:
    last = x.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if last else torch.contiguous_format


class _Convolve(torch.autograd.Function):
    """The convolution of `x`, which keeps `packed` instead of x, and the weight in its own type, not in that of x."""

    @staticmethod
    def forward(ctx, x, weight, packed, stride, padding, dilation):
        ctx.save_for_backward(packed.bytes, weight)
        ctx.packed = packed._replace(bytes=None)
        ctx.dtype, ctx.options = x.dtype, (stride, padding, dilation)
        return F.conv2d(x, weight.to(x.dtype), None, stride, padding, dilation)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grads):  # pyright: ignore[reportIncompatibleMethodOverride] - the decorator hides the name
        packed, weight = ctx.saved_tensors
        need_x, need_weight, *_ = ctx.needs_input_grad
        x = ops.unpack_spikes(ctx.packed._replace(bytes=packed), ctx.dtype)
        grad_x, grad_weight, _ = torch.ops.aten.convolution_backward(
            grads[0], x, weight.to(x.dtype), None, *ctx.options, False, (0, 0), 1, (need_x, need_weight, False)
        )
        return grad_x, grad_weight.to(weight.dtype) if need_weight else None, None, None, None, None
