"""Convolutions of bytes with 8-bit weights, whose sums are exact integers.

Shapes: N samples, O output channels, I input channels, H rows, W columns.
"""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from multifire.nn.conv import pick_pixels
from multifire.utils.log import log

LARGEST_WEIGHT = 127
LARGEST_ACTIVATION = 129
"""Processors without VNNI add pairs of products in 16 bits: 2·129·127 = 32,766 fits, 2·130·127 does not."""
LARGEST_SUM = 2**24
"""Integers up to this value are exact in float32, in which oneDNN returns its 32-bit sums."""
COMPARISONS = 5
"""Number of comparisons of oneDNN's sums with exact ones, for each layer and shape, before oneDNN is used."""


class Int8Conv2d(nn.Module):
    """Convolution of uint8 inputs with int8 weights: exact integer sums [N, O, H, W], as float32.

    oneDNN computes them after it has been compared with exact sums for this layer and this shape. If it is missing or
    wrong, a float convolution computes them, in which sums below 2^24 are exact too.
    """

    def __init__(self, before: int, after: int, kernel: int, stride: int):
        super().__init__()
        self.stride, self.padding = [stride, stride], [kernel // 2, kernel // 2]
        self.weight: Tensor
        self.register_buffer("weight", torch.zeros(after, before, kernel, kernel, dtype=torch.int8))
        self._picks = kernel == 1 and stride > 1
        self._packed: Tensor | None = None
        self._exact: dict[tuple[int, ...], bool] = {}

    def forward(self, x_NIHW: Tensor) -> Tensor:
        if self._picks:  # see multifire.nn.conv.reads_single_pixels
            x_NIHW = pick_pixels(x_NIHW, self.stride).contiguous(memory_format=torch.channels_last)
        key = (*x_NIHW.shape, torch.get_num_threads())
        if key not in self._exact:
            self._exact[key] = vendor_has_int8() and self._vendor_is_exact(x_NIHW.shape)
        return self._vendor_sums(x_NIHW) if self._exact[key] else self._float_sums(x_NIHW.float())

    def _vendor_sums(self, x_NIHW: Tensor) -> Tensor:
        stride = [1, 1] if self._picks else self.stride
        if self._packed is None:
            self._packed = _pack(self.weight, stride, self.padding)
        return _integer_conv(x_NIHW, self._packed, len(self.weight), stride, self.padding)

    def _float_sums(self, x_NIHW: Tensor) -> Tensor:
        stride = [1, 1] if self._picks else self.stride
        return F.conv2d(x_NIHW, self.weight.to(x_NIHW.dtype), None, stride, self.padding)

    def _vendor_is_exact(self, shape: torch.Size) -> bool:
        """Compare oneDNN's sums with exact ones several times, since a race is not wrong in every call.

        The first sample holds the largest activation everywhere, the worst case for saturation; the others are random.
        """
        noise = torch.Generator().manual_seed(0)
        x = torch.randint(0, LARGEST_ACTIVATION + 1, shape, generator=noise, dtype=torch.uint8)
        x[:1] = LARGEST_ACTIVATION
        x = x.contiguous(memory_format=torch.channels_last)
        expected = self._float_sums(x.double()).float()
        wrong = sum(not torch.equal(self._vendor_sums(x), expected) for _ in range(COMPARISONS))
        if wrong:
            log.warning(
                "this machine's int8 convolution of %s by %s gave wrong sums in %d of %d calls; a float convolution "
                "computes them instead, slowly", list(shape), list(self.weight.shape), wrong, COMPARISONS,
            )  # fmt: skip
        return not wrong

    def check_sums(self, largest: int, source: str) -> None:
        """Check that all sums over inputs 0..largest are exact in float32.

        Raises:
            ValueError: a sum may exceed 2^24.
        """
        largest_sum = largest * int(self.weight.int().abs().flatten(1).sum(1).max())
        if largest_sum > LARGEST_SUM:
            raise ValueError(f"{source}: sums of up to {largest_sum:,} may occur, expected at most {LARGEST_SUM:,}")


class CountConv2d(Int8Conv2d):
    """Int8Conv2d for event counts of any size, given as floats: their digits to base 128 are convolved one by one."""

    BASE = 128

    def forward(self, x_NIHW: Tensor) -> Tensor:
        digits = x_NIHW.round()
        largest = int(digits.max()) if digits.numel() else 0
        if not torch.equal(digits, x_NIHW) or (digits.numel() and digits.min() < 0):
            raise ValueError("the network takes event counts, found values that are not integers from 0 up")
        self.check_sums(largest, f"event counts of up to {largest:,}")
        sums, worth = super().forward(_bytes(digits % self.BASE)), 1
        while largest >= self.BASE:
            digits, largest, worth = (
                digits.div(self.BASE, rounding_mode="floor"),
                largest // self.BASE,
                worth * self.BASE,
            )
            sums = sums + worth * super().forward(_bytes(digits % self.BASE))
        return sums


def _bytes(x_NIHW: Tensor) -> Tensor:
    return x_NIHW.to(torch.uint8, memory_format=torch.channels_last)


@functools.cache
def vendor_has_int8() -> bool:
    """Return True if this build of torch has oneDNN's int8 convolution."""
    found = hasattr(torch.ops.onednn, "qconv_pointwise")
    if not found:
        log.info("torch has no int8 convolution here; float convolutions compute the integer sums")
    return found


def _pack(weight: Tensor, stride: list[int], padding: list[int]) -> Tensor:
    ones = torch.ones(len(weight))
    return torch.ops.onednn.qconv_prepack(weight, ones, 1.0, 0, stride, padding, [1, 1], 1, None)


def _integer_conv(x: Tensor, packed: Tensor, channels: int, stride: list[int], padding: list[int]) -> Tensor:
    """Return the sums in float32: all scales are 1, all zero points 0, and no operation follows."""
    scales, zeros = torch.ones(channels), torch.zeros(channels, dtype=torch.int32)
    return torch.ops.onednn.qconv_pointwise(
        x, 1.0, 0, packed, scales, zeros, None, stride, padding, [1, 1], 1, 1.0, 0, torch.float32, "none", [], ""
    )
