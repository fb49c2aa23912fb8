"""Convolutions with int8 weights and integer inputs, whose sums are exact.

Shapes: N samples, O output channels, I input channels, H rows, W columns.
"""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from multifire.nn.conv import pick_pixels
from multifire.utils.log import log

LARGEST_WEIGHT = 127
"""Largest absolute value of a weight: -128 is not used."""
LARGEST_ACTIVATION = 129
"""Processors without VNNI add pairs of products in 16 bits: 2·129·127 = 32,766 fits, 2·130·127 does not."""
LARGEST_SUM = 2**24
"""Integers up to this value are exact in float32, in which oneDNN returns its 32-bit sums."""
COMPARISONS = 5
"""Number of times that oneDNN's sums are compared with exact ones, for each layer and shape, before they are used."""


class Int8Conv2d(nn.Module):
    """Convolve uint8 inputs [N, I, H, W] with int8 weights: exact integer sums [N, O, H, W], as float32.

    oneDNN computes the sums if they equal exact ones for this layer and this shape. If oneDNN's int8 convolution is
    missing or wrong, a float32 convolution computes them, which is exact up to 2^24 too.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel: int, stride: int):
        super().__init__()
        self.stride, self.padding = [stride, stride], [kernel // 2, kernel // 2]
        self.weight: Tensor
        self.register_buffer("weight", torch.zeros(out_channels, in_channels, kernel, kernel, dtype=torch.int8))
        self._picks_pixels = kernel == 1 and stride > 1
        self._packed: Tensor | None = None
        self._exact: dict[tuple[int, ...], bool] = {}

    def forward(self, x_NIHW: Tensor) -> Tensor:
        if self._picks_pixels:  # see multifire.nn.conv.reads_single_pixels
            x_NIHW = pick_pixels(x_NIHW, self.stride).contiguous(memory_format=torch.channels_last)
        key = (*x_NIHW.shape, torch.get_num_threads())
        if key not in self._exact:
            self._exact[key] = vendor_has_int8() and self._vendor_is_exact(x_NIHW.shape)
        return self._vendor_sums(x_NIHW) if self._exact[key] else self._float_sums(x_NIHW.float())

    def _vendor_sums(self, x_NIHW: Tensor) -> Tensor:
        stride = [1, 1] if self._picks_pixels else self.stride
        if self._packed is None:
            self._packed = _pack(self.weight, stride, self.padding)
        return _integer_conv(x_NIHW, self._packed, len(self.weight), stride, self.padding)

    def _float_sums(self, x_NIHW: Tensor) -> Tensor:
        stride = [1, 1] if self._picks_pixels else self.stride
        return F.conv2d(x_NIHW, self.weight.to(x_NIHW.dtype), None, stride, self.padding)

    def _vendor_is_exact(self, shape: torch.Size) -> bool:
        """Return True if oneDNN's sums equal exact ones in several calls; a race gives wrong sums in some calls only.

        The first sample has the largest activation everywhere, the worst case for saturation; the others are random.
        """
        noise = torch.Generator().manual_seed(0)
        x = torch.randint(0, LARGEST_ACTIVATION + 1, shape, generator=noise, dtype=torch.uint8)
        x[:1] = LARGEST_ACTIVATION
        x = x.contiguous(memory_format=torch.channels_last)
        expected = self._float_sums(x.double()).float()
        wrong = sum(not torch.equal(self._vendor_sums(x), expected) for _ in range(COMPARISONS))
        if wrong:
            log.warning(
                "this machine's int8 convolution of %s by %s gave wrong sums in %d of %d calls; a slower float "
                "convolution computes them instead", list(shape), list(self.weight.shape), wrong, COMPARISONS,
            )  # fmt: skip
        return not wrong

    def check_sums(self, largest: int, source: str) -> None:
        """Check that all sums over inputs 0..largest are exact in float32.

        Raises:
            ValueError: a sum may exceed 2^24.
        """
        largest_sum = largest * int(self.weight.int().abs().flatten(1).sum(1).max())
        if largest_sum > LARGEST_SUM:
            raise ValueError(f"{source}: sums may reach {largest_sum:,}, expected at most {LARGEST_SUM:,}")


class CountConv2d(Int8Conv2d):
    """Int8Conv2d for event counts of any size, given as floats.

    The counts' digits to base 128 are convolved one after the other: sums = Σ_i 128^i · conv(digit_i).
    """

    BASE = 128

    def forward(self, x_NIHW: Tensor) -> Tensor:
        quotient = x_NIHW.round()
        if not (torch.equal(quotient, x_NIHW) and x_NIHW.isfinite().all() and (x_NIHW >= 0).all()):
            raise ValueError("found values that are not integers >= 0, expected event counts")
        largest = int(quotient.max()) if quotient.numel() else 0
        self.check_sums(largest, f"event counts of up to {largest:,}")
        sums, power = super().forward(_to_uint8(quotient % self.BASE)), 1
        while largest >= self.BASE:
            quotient = quotient.div(self.BASE, rounding_mode="floor")
            largest, power = largest // self.BASE, power * self.BASE
            sums = sums + power * super().forward(_to_uint8(quotient % self.BASE))
        return sums


def _to_uint8(x_NIHW: Tensor) -> Tensor:
    return x_NIHW.to(torch.uint8, memory_format=torch.channels_last)


@functools.cache
def vendor_has_int8() -> bool:
    """Return True if this build of torch has oneDNN's int8 convolution."""
    found = hasattr(torch.ops.onednn, "qconv_pointwise")
    if not found:
        log.info("this build of torch has no int8 convolution; float convolutions compute the integer sums")
    return found


def _pack(weight: Tensor, stride: list[int], padding: list[int]) -> Tensor:
    """Return the weight in oneDNN's own layout."""
    ones = torch.ones(len(weight))
    return torch.ops.onednn.qconv_prepack(weight, ones, 1.0, 0, stride, padding, [1, 1], 1, None)


def _integer_conv(x: Tensor, packed: Tensor, channels: int, stride: list[int], padding: list[int]) -> Tensor:
    """Return oneDNN's sums in float32: all scales are 1, all zero points are 0, and no operation follows."""
    scales, zeros = torch.ones(channels), torch.zeros(channels, dtype=torch.int32)
    return torch.ops.onednn.qconv_pointwise(
        x, 1.0, 0, packed, scales, zeros, None, stride, padding, [1, 1], 1, 1.0, 0, torch.float32, "none", [], ""
    )
