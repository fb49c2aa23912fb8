"""A convolution that remembers its spikes in a few bits each."""

import threading
import weakref
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from multifire import ops


class SpikeConv2d(nn.Conv2d):
    """nn.Conv2d whose backward keeps an input of integers in 2, 4 or 8 bits each, and any other input as it is.

    Spikes and their residual sums are such integers. Whether the values fit is found out in the pass that packs them,
    so an input that does not fit costs memory, never a wrong gradient.
    """

    bits = 2  # that the last input needed, so that no pass is tried in vain at every step

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        simple = (
            bias is None and self.groups == 1 and self.padding_mode == "zeros" and not isinstance(self.padding, str)
        )
        learns = torch.is_grad_enabled() and weight.requires_grad
        autocast = torch.is_autocast_enabled(input.device.type)
        fits = autocast or input.dtype == weight.dtype
        # A compiled graph decides itself what to keep; and torch says what is wrong with types that do not fit.
        if not (simple and learns and fits) or torch.compiler.is_compiling():
            return super()._conv_forward(input, weight, bias)
        if autocast:
            input = input.to(torch.get_autocast_dtype(input.device.type))
        stride = self.stride
        if self.kernel_size == (1, 1) and self.padding == (0, 0) and stride != (1, 1):
            input, stride = cast(Tensor, _PickPixels.apply(input, stride)), (1, 1)
        packed = _memo.pack(input, self.bits)
        if packed is None:
            return F.conv2d(input, weight.to(input.dtype), None, stride, self.padding, self.dilation)
        self.bits = packed.bits
        return _Convolve.apply(input, weight, packed, stride, self.padding, self.dilation)


class _PickPixels(torch.autograd.Function):
    """The pixels that a strided 1×1 convolution reads, in x's memory order, and so their gradient.

    Left to itself, torch 2.13 writes past its memory on the way to the weights' gradient, where there are fewer than 8
    channels (oneDNN on AVX2). A slice's own gradient has rows before channels, whatever x has, and takes ten times as
    long to add to the other gradients of a channels-last x.
    """

    @staticmethod
    def forward(x, stride):
        return x[:, :, :: stride[0], :: stride[1]].contiguous(memory_format=_order(x))

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
    """The convolution of `x`, which keeps `packed` in its stead, and the weight as it is, not in the type of x."""

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


class _Memo(threading.local):
    """What the activation packed last became: a block's first convolution and its shortcut read the same one."""

    def __init__(self):
        self._base: weakref.ref | None = None
        self._bytes: weakref.ref | None = None
        self._packed: ops.PackedSpikes | None = None  # without its bytes, which live as long as a graph holds them
        self._key: tuple = ()

    def pack(self, x: Tensor, bits: int) -> ops.PackedSpikes | None:
        base = x if x._base is None else x._base
        key = (x.data_ptr(), x.shape, x.stride(), x.dtype, x._version)
        if self._base is not None and self._bytes is not None and self._base() is base and self._key == key:
            held = self._bytes()
            if held is not None and self._packed is not None:
                return self._packed._replace(bytes=held)
        packed = ops.pack_spikes(x, bits)
        if packed is not None:
            self._base, self._bytes, self._key = weakref.ref(base), weakref.ref(packed.bytes), key
            self._packed = packed._replace(bytes=None)
        return packed


_memo = _Memo()
