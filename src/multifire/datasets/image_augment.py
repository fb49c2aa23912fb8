"""Augmentation of images beyond crop and flip, batch by batch, on the batch's device.

Shapes: N samples, C channels, H rows, W columns.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import log

import numpy as np
import torch
from torch import Tensor

from multifire.datasets.augment import Draws
from multifire.datasets.trivial_augment import apply_operations, draw_operations

Augment = Callable[[Tensor, Draws], Tensor]
"""augment(samples, draws) -> samples of the same shape and type: a training batch of images [N, C, H, W], bytes or
float32 before normalisation, or of event frames [N, T, 2, H, W], on its device. Take random numbers from `draws` only:
they depend on the seed, the epoch and the batch, and lie on the CPU."""
ERASED_AREA = (0.02, 0.33)
"""Random erasing: fraction of the image that a rectangle covers."""
ERASED_ASPECT = (0.3, 1 / 0.3)
"""Random erasing: height / width of a rectangle, uniform in its logarithm."""


@dataclass(frozen=True)
class ImageAugmentation:
    """Options of DataConfig; see there."""

    cutout: int = 0
    random_erasing: float = 0.0
    trivial_augment: bool = False
    mixup: float = 0.0

    @property
    def is_on(self) -> bool:
        """True if any option changes images."""
        return self != ImageAugmentation()

    def check(self, kind: np.dtype) -> None:
        """Raise a ValueError if an option does not fit images of this type."""
        if self.trivial_augment and kind != np.uint8:
            raise ValueError(f"data.trivial_augment needs images of bytes (uint8), found {kind}; leave it out")

    def draw(self, shape: torch.Size, draws: Draws) -> "Plan":
        """Draw the random numbers of a batch of images of this shape [N, C, H, W]; the same number for all options."""
        H, W = shape[2:]
        operations = draw_operations(draws)
        row_N, column_N = draws.integers(H), draws.integers(W)
        side_N = torch.full_like(row_N, self.cutout)
        cut = torch.stack([row_N - self.cutout // 2, column_N - self.cutout // 2, side_N, side_N])
        boxes = [cut, draw_rectangles(H, W, self.random_erasing, draws)]
        return Plan(self, operations, torch.stack(boxes))


@dataclass(frozen=True)
class Plan:
    """What is done to the images of one batch."""

    options: ImageAugmentation
    operations: tuple[Tensor, Tensor]
    """See `draw_operations`."""
    boxes: Tensor
    """Top, left, height and width of the squares of cutout and of the rectangles of random erasing, int64 [2, 4, N]."""

    def change_bytes(self, images_NCHW: Tensor) -> Tensor:
        """Apply the operations of TrivialAugment to bytes."""
        return apply_operations(images_NCHW, *self.operations) if self.options.trivial_augment else images_NCHW

    def erase(self, x_NCHW: Tensor) -> Tensor:
        """Set the boxes to 0, the mean colour of normalised images."""
        if not self.options.cutout and not self.options.random_erasing:
            return x_NCHW
        boxes = self.boxes.to(x_NCHW.device, non_blocking=True)
        H, W = x_NCHW.shape[2:]
        for on, box_4N in zip((self.options.cutout, self.options.random_erasing), boxes, strict=True):
            if on:
                x_NCHW = x_NCHW.masked_fill(in_box(H, W, *box_4N)[:, None], 0)
        return x_NCHW


def draw_rectangles(H: int, W: int, probability: float, draws: Draws) -> Tensor:
    """Return top, left, height and width of a random rectangle of each sample, int64 [4, N]; empty ones for the others.

    A rectangle that is longer than the image is cut off at its length.

    Source: Zhong et al., "Random erasing data augmentation", AAAI 2020.
    """
    chosen_N = draws.uniform(0, 1) < probability
    area_N = draws.uniform(*ERASED_AREA) * H * W
    aspect_N = draws.uniform(*map(log, ERASED_ASPECT)).exp()
    height_N = (area_N * aspect_N).sqrt().round().clamp(1, H)
    width_N = (area_N / aspect_N).sqrt().round().clamp(1, W)
    top_N, left_N = draws.uniform(0, 1), draws.uniform(0, 1)
    top_N, left_N = (top_N * (H + 1 - height_N)).floor(), (left_N * (W + 1 - width_N)).floor()
    return torch.stack([top_N, left_N, height_N * chosen_N, width_N]).long()


def in_box(H: int, W: int, top_N: Tensor, left_N: Tensor, height_N: Tensor, width_N: Tensor) -> Tensor:
    """Return for each pixel [N, H, W] whether it lies in its sample's rectangle."""
    rows, columns = (torch.arange(n, device=top_N.device) for n in (H, W))
    row = (rows >= top_N[:, None]) & (rows < (top_N + height_N)[:, None])
    column = (columns >= left_N[:, None]) & (columns < (left_N + width_N)[:, None])
    return row[:, :, None] & column[:, None, :]


def call_augment(augment: Augment, samples: Tensor, draws: Draws) -> Tensor:
    """Call the user's function on a batch.

    Raises:
        ValueError: it returns something else than samples of the same shape and type.
    """
    if not len(samples):  # a later process may have none
        return samples
    changed = augment(samples, draws)
    if not isinstance(changed, Tensor) or changed.shape != samples.shape or changed.dtype != samples.dtype:
        found = f"{changed.dtype} {list(changed.shape)}" if isinstance(changed, Tensor) else type(changed).__name__
        raise ValueError(f"augment returned {found}, expected {samples.dtype} {list(samples.shape)}, as it was given")
    return changed.to(samples.device)
