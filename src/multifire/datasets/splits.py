"""Splits of a data set. Imports NumPy only when a split is divided."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True, eq=False)
class Split:
    """Images [N, C, H, W], uint8 or float32, and their labels [N] int64."""

    images: "np.ndarray"
    labels: "np.ndarray"

    def __post_init__(self):
        assert self.images.ndim == 4
        assert self.images.dtype in ("uint8", "float32")
        assert self.labels.dtype == "int64"
        assert self.labels.shape == self.images.shape[:1]

    def __len__(self) -> int:
        return len(self.labels)

    def pick(self, index: "np.ndarray") -> "Split":
        """Return the samples at `index`, which holds positions or a mask."""
        return Split(self.images[index], self.labels[index])


@dataclass(frozen=True, eq=False)
class EventSplit:
    """Recordings as frames, memory-mapped; a split is a selection of rows, without a copy."""

    frames: "np.ndarray"
    """uint8 [all, T, 2, H, W]: events of each polarity (OFF, ON) in each cell, at most 255."""
    labels: "np.ndarray"
    """Class of each sample, int64 [N]."""
    names: "np.ndarray"
    """Name of each sample [N]: its recording and, if that has several samples, its number."""
    rows: "np.ndarray"
    """Row in `frames` of each sample, int64 [N]."""

    def __post_init__(self):
        assert self.frames.ndim == 5
        assert self.frames.dtype == "uint8"
        assert self.labels.dtype == "int64"
        assert self.labels.shape == self.names.shape == self.rows.shape

    def __len__(self) -> int:
        return len(self.labels)

    def pick(self, index: "np.ndarray") -> "EventSplit":
        """Return the samples at `index`, which holds positions or a mask."""
        return EventSplit(self.frames, self.labels[index], self.names[index], self.rows[index])


AnySplit = TypeVar("AnySplit", Split, EventSplit)


def hold_out(split: AnySplit, share: float, seed: int) -> tuple[AnySplit, AnySplit]:
    """Divide a split into (training, validation) with the same fraction of every class, drawn by `seed`.

    Raises:
        ValueError: not 0 < share < 1, an empty part, or a negative seed.
    """
    import numpy as np

    if not 0 < share < 1:
        raise ValueError(f"validation is {share}, expected 0 < share < 1")
    rng = np.random.default_rng(_entropy(seed, 0))
    held = np.zeros(len(split), dtype=bool)
    for label in np.unique(split.labels):
        members = rng.permutation(np.flatnonzero(split.labels == label))
        held[members[: int(share * len(members) + 0.5)]] = True
    if held.all() or not held.any():
        side, change = ("training", "smaller") if held.all() else ("validation", "larger")
        raise ValueError(
            f"holding out a share of {share} of each class of {len(split):,} samples leaves none for {side}; "
            f"choose a {change} share"
        )
    return split.pick(~held), split.pick(held)


def take(split: AnySplit, limit: int, seed: int) -> AnySplit:
    """Return `limit` samples drawn by `seed`, or all if there are fewer.

    Raises:
        ValueError: limit < 1 or a negative seed.
    """
    import numpy as np

    if limit < 1:
        raise ValueError(f"limit is {limit}, expected at least 1")
    if limit >= len(split):
        return split
    return split.pick(np.random.default_rng(_entropy(seed, 1)).permutation(len(split))[:limit])


def _entropy(seed: int, purpose: int) -> list[int]:
    if seed < 0:
        raise ValueError(f"seed is {seed}, expected at least 0")
    return [seed, purpose]
