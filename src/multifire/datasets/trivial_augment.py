"""TrivialAugment-wide: change each image of a batch by one random operation of random strength, on the batch's device.

Source: Müller & Hutter, "TrivialAugment: tuning-free yet state-of-the-art data augmentation", ICCV 2021; the operations
are those of Pillow that their code calls, and equal them on bytes.

Shapes: N samples, C channels, H rows, W columns.
"""

from collections.abc import Callable
from math import radians
from typing import NamedTuple

import torch
from torch import Tensor

from multifire.datasets.augment import Draws

LEVELS = 30
"""Strengths are level / 30 of the greatest one, with a random level from 0 to 30."""
GREY_WEIGHTS = (19595, 38470, 7471)
"""Weights of R, G and B in the brightness of a pixel, in 1/65536, as Pillow uses them."""


class Operation(NamedTuple):
    """An operation and its range of strengths."""

    name: str
    apply: Callable[[Tensor, Tensor], Tensor]
    """Takes images uint8 [n, C, H, W] and the strength of each, float64 [n]."""
    low: float = 0.0
    high: float = 0.0
    whole: bool = False
    """The strength is rounded down to a whole number."""
    signed: bool = False
    """The strength is negative with probability 1/2."""


def trivial_augment(images_NCHW: Tensor, draws: Draws) -> Tensor:
    """Return the images, each changed by one of OPERATIONS, chosen with equal probabilities.

    Args:
        images_NCHW: bytes.
        draws: the random numbers.
    """
    return apply_operations(images_NCHW, *draw_operations(draws))


def draw_operations(draws: Draws) -> tuple[Tensor, Tensor]:
    """Return for each sample the number of its operation, int64 [N], and its strength, float64 [N], on the CPU."""
    operation_N, level_N = draws.integers(len(OPERATIONS)), draws.integers(LEVELS + 1)
    sign_N = 1 - 2 * draws.integers(2)
    return operation_N, strengths(operation_N, level_N, sign_N)


def strengths(operation_N: Tensor, level_N: Tensor, sign_N: Tensor) -> Tensor:
    """Return the strength of each sample's operation at its level 0 .. 30, with the sign where it may be negative."""
    low, high = (torch.tensor([getattr(op, end) for op in OPERATIONS], dtype=torch.float64) for end in ("low", "high"))
    whole, signed = (torch.tensor([getattr(op, flag) for op in OPERATIONS]) for flag in ("whole", "signed"))
    span_N = level_N * (high - low)[operation_N] / LEVELS
    strength_N = torch.where(whole[operation_N], span_N.trunc(), span_N) + low[operation_N]
    return torch.where(signed[operation_N], strength_N * sign_N, strength_N)


def apply_operations(images_NCHW: Tensor, operation_N: Tensor, strength_N: Tensor) -> Tensor:
    """Apply to each image its operation; the samples of an operation are computed together.

    Args:
        images_NCHW: bytes, on any device.
        operation_N: number of each sample's operation, on the CPU, so that no size is read from a GPU.
        strength_N: strength of each, float64, on the CPU.
    """
    device = images_NCHW.device
    order_N = operation_N.argsort(stable=True)
    counts = operation_N.bincount(minlength=len(OPERATIONS)).tolist()
    place_N, strength_N = (values.to(device, non_blocking=True) for values in (order_N, strength_N[order_N]))
    groups = zip(OPERATIONS, images_NCHW[place_N].split(counts), strength_N.split(counts), strict=True)
    changed = torch.cat([op.apply(images, strength) if len(images) else images for op, images, strength in groups])
    return torch.empty_like(changed).index_copy_(0, place_N, changed)


def identity(images: Tensor, strength: Tensor) -> Tensor:
    """Return the images."""
    return images


def auto_contrast(images: Tensor, strength: Tensor) -> Tensor:
    """Stretch each channel so that its darkest value becomes 0 and its brightest 255."""
    low, high = (values.long()[:, :, None] for values in (images.amin((2, 3)), images.amax((2, 3))))
    values = torch.arange(256, device=images.device)
    table = 255 * (values - low) // (high - low).clamp(min=1)
    return _look_up(images, torch.where(high > low, table, values))


def equalize(images: Tensor, strength: Tensor) -> Tensor:
    """Map the values of each channel so that they occur about equally often."""
    n, channels = images.shape[:2]
    counts = torch.zeros(n, channels, 256, dtype=torch.int64, device=images.device)
    values = images.flatten(2).long()
    counts.scatter_add_(2, values, torch.ones_like(values))
    brightest = images.amax((2, 3)).long()[:, :, None]
    step = (counts.sum(2, keepdim=True) - counts.gather(2, brightest)) // 255
    below = counts.cumsum(2) - counts
    table = (below + step // 2) // step.clamp(min=1)
    return _look_up(images, torch.where(step > 0, table, torch.arange(256, device=images.device)))


def _look_up(images: Tensor, table_NCV: Tensor) -> Tensor:
    """Replace each value by its entry in the table of its sample and channel."""
    table_NCV = table_NCV.clamp(0, 255).to(torch.uint8)
    return table_NCV.gather(2, images.flatten(2).long()).view(images.shape)


def posterize(images: Tensor, strength: Tensor) -> Tensor:
    """Keep the 8 - strength highest bits of each value."""
    mask = 256 - torch.pow(2.0, strength.view(-1, 1, 1, 1)).to(torch.int64)
    return images & mask.to(torch.uint8)


def solarize(images: Tensor, strength: Tensor) -> Tensor:
    """Invert the values of at least 256 - strength."""
    return torch.where(images.long() >= 256 - strength.view(-1, 1, 1, 1).long(), 255 - images, images)


def brightness(images: Tensor, strength: Tensor) -> Tensor:
    """Blend with black: strength 1 is the image."""
    return _blend(torch.zeros_like(images), images, strength)


def color(images: Tensor, strength: Tensor) -> Tensor:
    """Blend with the grey image: strength 1 is the image; images without three channels stay as they are."""
    return _blend(_grey(images).expand_as(images), images, strength) if images.shape[1] == 3 else images


def contrast(images: Tensor, strength: Tensor) -> Tensor:
    """Blend with the mean brightness: strength 1 is the image."""
    grey = _grey(images).long()
    pixels = grey[0].numel()
    mean = (2 * grey.sum((1, 2, 3), keepdim=True) + pixels) // (2 * pixels)
    return _blend(mean.to(torch.uint8).expand_as(images), images, strength)


def sharpness(images: Tensor, strength: Tensor) -> Tensor:
    """Blend with the smoothed image, whose edge pixels are those of the image: strength 1 is the image."""
    if min(images.shape[2:]) < 3:
        return images
    values = images.int()
    rows = values[:, :, :-2] + values[:, :, 1:-1] + values[:, :, 2:]
    sums = rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:] + 4 * values[:, :, 1:-1, 1:-1]
    smooth = images.clone()
    smooth[:, :, 1:-1, 1:-1] = ((2 * sums + 13) // 26).to(torch.uint8)
    return _blend(smooth, images, strength)


def _grey(images: Tensor) -> Tensor:
    """Return the brightness of each pixel, uint8 [n, 1, H, W]."""
    if images.shape[1] == 3:
        weights = torch.tensor(GREY_WEIGHTS, device=images.device).view(1, 3, 1, 1)
        return ((images * weights).sum(1, keepdim=True) + (1 << 15) >> 16).to(torch.uint8)
    return images.long().sum(1, keepdim=True).div(images.shape[1], rounding_mode="floor").to(torch.uint8)


def _blend(start: Tensor, images: Tensor, strength: Tensor) -> Tensor:
    """Return start + strength · (images - start), rounded towards zero."""
    first = start.float()
    blended = first + strength.float().view(-1, 1, 1, 1) * (images.float() - first)
    return blended.clamp(0, 255).to(torch.uint8)


def rotate(images: Tensor, strength: Tensor) -> Tensor:
    """Rotate about the centre by `strength` degrees, counter-clockwise; black outside."""
    angle = strength * radians(1)
    cos, sin = angle.cos(), angle.sin()
    H, W = images.shape[2:]
    return _affine(images, (cos, -sin), (sin, cos), centre=(H / 2, W / 2))


def shear_x(images: Tensor, strength: Tensor) -> Tensor:
    """Shift each row by strength · its number."""
    one, zero = torch.ones_like(strength), torch.zeros_like(strength)
    return _affine(images, (one, strength), (zero, one))


def shear_y(images: Tensor, strength: Tensor) -> Tensor:
    """Shift each column by strength · its number."""
    one, zero = torch.ones_like(strength), torch.zeros_like(strength)
    return _affine(images, (one, zero), (strength, one))


def translate_x(images: Tensor, strength: Tensor) -> Tensor:
    """Shift the image by `strength` pixels to the left."""
    one, zero = torch.ones_like(strength), torch.zeros_like(strength)
    return _affine(images, (one, zero), (zero, one), shift=(zero, strength))


def translate_y(images: Tensor, strength: Tensor) -> Tensor:
    """Shift the image by `strength` pixels upwards."""
    one, zero = torch.ones_like(strength), torch.zeros_like(strength)
    return _affine(images, (one, zero), (zero, one), shift=(strength, zero))


def _affine(
    images: Tensor,
    for_x: tuple[Tensor, Tensor],
    for_y: tuple[Tensor, Tensor],
    centre: tuple[float, float] = (0.0, 0.0),
    shift: tuple[Tensor | None, Tensor | None] = (None, None),
) -> Tensor:
    """Return images whose pixel at (y, x) is the source pixel at M · (x, y) + shift about the centre; 0 outside.

    Args:
        images: uint8 [n, C, H, W].
        for_x: factors of x and y for the source's x, each [n].
        for_y: factors of x and y for the source's y.
        centre: y and x of the point about which M turns.
        shift: added to the source's y and x, each [n].
    """
    n, channels, H, W = images.shape
    y, x = (torch.arange(size, device=images.device, dtype=torch.float64) + 0.5 for size in (H, W))
    y, x = (y - centre[0])[:, None], (x - centre[1])[None, :]

    def source(factors: tuple[Tensor, Tensor], middle: float, moved: Tensor | None) -> Tensor:
        of_x, of_y = (factor.view(-1, 1, 1) for factor in factors)
        moved_by = 0.0 if moved is None else moved.view(-1, 1, 1)
        return (of_x * x + of_y * y + middle + moved_by).floor().long()

    row, column = source(for_y, centre[0], shift[0]), source(for_x, centre[1], shift[1])
    outside = (row < 0) | (row >= H) | (column < 0) | (column >= W)
    place = (row * W + column).masked_fill(outside, 0).view(n, 1, H * W).expand(n, channels, H * W)
    moved = images.flatten(2).gather(2, place).view(images.shape)
    return moved.masked_fill(outside[:, None], 0)


OPERATIONS: tuple[Operation, ...] = (
    Operation("identity", identity),
    Operation("auto_contrast", auto_contrast),
    Operation("equalize", equalize),
    Operation("rotate", rotate, 0, 135, whole=True, signed=True),
    Operation("solarize", solarize, 0, 256, whole=True),
    Operation("color", color, 0.01, 2.0),
    Operation("posterize", posterize, 0, 6, whole=True),
    Operation("contrast", contrast, 0.01, 2.0),
    Operation("brightness", brightness, 0.01, 2.0),
    Operation("sharpness", sharpness, 0.01, 2.0),
    Operation("shear_x", shear_x, 0, 0.99, signed=True),
    Operation("shear_y", shear_y, 0, 0.99, signed=True),
    Operation("translate_x", translate_x, 0, 32, whole=True, signed=True),
    Operation("translate_y", translate_y, 0, 32, whole=True, signed=True),
)
"""The wide space of the paper; strengths in degrees, pixels, bits, factors or grey levels, as each operation says."""
