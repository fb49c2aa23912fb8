"""Random numbers of a batch, and augmentation of event frames, batch by batch, on the batch's device.

Shapes: N samples, T frames, C polarities, H rows, W columns, P = H·W cells of a plane.
"""

from collections.abc import Sequence
from math import radians

import torch
from torch import Tensor
from torch.nn import functional as F

from multifire.config import DataConfig


class Draws:
    """Random numbers of a batch: drawn for all samples, returned for those of this process.

    So several processes augment a batch exactly as one process does.
    """

    def __init__(self, generator: torch.Generator, samples: int, own: slice = slice(None)):
        """Use `generator`, which lies on the CPU, so that every device makes the same batch."""
        self._generator, self._samples, self._own = generator, samples, own

    def integers(self, below: int) -> Tensor:
        """Return int64 [N] in 0 .. below - 1."""
        return torch.randint(below, (self._samples,), generator=self._generator)[self._own]

    def uniform(self, low: float, high: float) -> Tensor:
        """Return float64 [N] in [low, high)."""
        unit = torch.rand(self._samples, generator=self._generator, dtype=torch.float64)
        return (unit * (high - low) + low)[self._own]


def augment(
    frames_NTCHW: Tensor, labels_N: Tensor, cfg: DataConfig, mirror: Sequence[int], draws: Draws
) -> tuple[Tensor, Tensor]:
    """Augment samples as `cfg` says, all frames and polarities of a sample alike; return them and their labels.

        out[n, t, c, row, column] = frames[n, t - dt, c or 1 - c, source(row, column)], 0 outside

    Counts are only moved, so they stay integers.

    Args:
        frames_NTCHW: counts, of any dtype.
        labels_N: their classes.
        cfg: flip, roll, rotation, cutout, swap_polarity and time_jitter; see there.
        mirror: class of the mirror image of each class; empty if it is the class itself.
        draws: the random numbers.
    """
    H, W = frames_NTCHW.shape[3:]
    device = frames_NTCHW.device

    def draw(low: float, high: float) -> Tensor:
        """Draw uniformly from [low, high), even if unused: one option must not change the numbers of another."""
        return draws.uniform(low, high).to(device)

    mirrored = draw(0, 2).long() * int(cfg.flip)
    down, right = (draw(-cfg.roll, cfg.roll + 1).floor().long() for _ in range(2))
    angle = draw(-radians(cfg.rotation), radians(cfg.rotation))
    side = draw(0, cfg.cutout + 1).long()
    top, left = draw(0, H).long(), draw(0, W).long()
    swapped = (draw(0, 1) < cfg.swap_polarity).long()
    later = draw(-cfg.time_jitter, cfg.time_jitter + 1).floor().long()
    if cfg.flip or cfg.roll or cfg.rotation or cfg.cutout:
        source_NHW = places(H, W, mirrored, down, right, angle)
        source_NHW = source_NHW.masked_fill(inside(H, W, top - side // 2, left - side // 2, side), H * W)
        frames_NTCHW = move(frames_NTCHW, source_NHW)
    if cfg.swap_polarity or cfg.time_jitter:
        frames_NTCHW = shift(frames_NTCHW, later, swapped)
    if cfg.flip and mirror:
        labels_N = torch.where(mirrored == 1, torch.tensor(mirror, device=device)[labels_N], labels_N)
    return frames_NTCHW, labels_N


def places(H: int, W: int, mirrored_N: Tensor, down_N: Tensor, right_N: Tensor, angle_N: Tensor) -> Tensor:
    """Return the source cell [N, H, W] of each cell after mirroring, rolling, then rotating; H·W if it is outside.

    Args:
        H: rows.
        W: columns.
        mirrored_N: 0 or 1.
        down_N: cyclic shift in rows.
        right_N: cyclic shift in columns.
        angle_N: rotation about the centre in radians, to the nearest cell.
    """
    rows, columns = (torch.arange(n, device=mirrored_N.device, dtype=torch.float64) - (n - 1) / 2 for n in (H, W))
    cos, sin = angle_N.cos().view(-1, 1, 1), angle_N.sin().view(-1, 1, 1)
    row = (cos * rows[:, None] - sin * columns + (H - 1) / 2).round().long()
    column = (sin * rows[:, None] + cos * columns + (W - 1) / 2).round().long()
    outside = (row < 0) | (row >= H) | (column < 0) | (column >= W)
    row = (row - down_N.view(-1, 1, 1)) % H
    column = (column - right_N.view(-1, 1, 1)) % W
    column = torch.where(mirrored_N.view(-1, 1, 1) == 1, W - 1 - column, column)
    return (row * W + column).masked_fill(outside, H * W)


def inside(H: int, W: int, top_N: Tensor, left_N: Tensor, side_N: Tensor) -> Tensor:
    """Return for each cell [N, H, W] whether it lies in its sample's square."""
    rows, columns = (torch.arange(n, device=top_N.device) for n in (H, W))
    row = (rows >= top_N[:, None]) & (rows < (top_N + side_N)[:, None])
    column = (columns >= left_N[:, None]) & (columns < (left_N + side_N)[:, None])
    return row[:, :, None] & column[:, None, :]


def move(frames_NTCHW: Tensor, source_NHW: Tensor) -> Tensor:
    """Return the counts of the source cells; 0 for H·W."""
    N, T, C, H, W = frames_NTCHW.shape
    planes_NTCP = F.pad(frames_NTCHW.flatten(3), (0, 1))
    index_NTCP = source_NHW.view(N, 1, 1, H * W).expand(N, T, C, H * W)
    return planes_NTCP.gather(3, index_NTCP).view(N, T, C, H, W)


def shift(frames_NTCHW: Tensor, later_N: Tensor, swapped_N: Tensor) -> Tensor:
    """Shift frames in time, filling gaps with empty frames, and exchange polarities if swapped_N is 1."""
    N, T, C = frames_NTCHW.shape[:3]
    device = frames_NTCHW.device
    step_NT = torch.arange(T, device=device) - later_N[:, None]
    channel_NC = torch.arange(C, device=device) ^ swapped_N[:, None]
    sample = torch.arange(N, device=device).view(N, 1, 1)
    frames = frames_NTCHW[sample, step_NT.clamp(0, T - 1)[:, :, None], channel_NC[:, None, :]]
    within_NT = (step_NT >= 0) & (step_NT < T)
    return frames * within_NT.view(N, T, 1, 1, 1)
