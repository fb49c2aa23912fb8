"""Samples of a data set, and how they are divided. Imports NumPy only when something is divided."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True, eq=False)
class Split:
    """Images [N, C, H, W] uint8 and their labels [N] int64."""

    images: "np.ndarray"
    labels: "np.ndarray"

    def __post_init__(self):
        assert self.images.ndim == 4
        assert self.images.dtype == "uint8"
        assert self.labels.dtype == "int64"
        assert self.labels.shape == self.images.shape[:1]

    def __len__(self) -> int:
        return len(self.labels)

    def pick(self, index: "np.ndarray") -> "Split":
        """The samples that `index` (positions, or a mask) names."""
        return Split(self.images[index], self.labels[index])


@dataclass(frozen=True, eq=False)
class EventSplit:
    """Recordings as frames, memory-mapped: a split is a choice of rows, and copies none."""

    frames: "np.ndarray"
    """uint8 [all, T, 2, H, W]: events of each polarity (OFF, ON) in each cell, 255 where there were more."""
    labels: "np.ndarray"
    """int64 [N]."""
    names: "np.ndarray"
    """Name of each sample [N]: its recording and, where that holds several, its number there."""
    rows: "np.ndarray"
    """Where in `frames` each sample is, int64 [N]."""

    def __post_init__(self):
        assert self.frames.ndim == 5
        assert self.frames.dtype == "uint8"
        assert self.labels.dtype == "int64"
        assert self.labels.shape == self.names.shape == self.rows.shape

    def __len__(self) -> int:
        return len(self.labels)

    def pick(self, index: "np.ndarray") -> "EventSplit":
        """The samples that `index` (positions, or a mask) names."""
        return EventSplit(self.frames, self.labels[index], self.names[index], self.rows[index])


AnySplit = TypeVar("AnySplit", Split, EventSplit)


def hold_out(split: AnySplit, share: float, seed: int) -> tuple[AnySplit, AnySplit]:
    """Split off the same share of every class, chosen by `seed`: (training, validation), each in its old order.

    Raises:
        ValueError: not 0 < share < 1, one side would be empty, or seed is below 0.
    """
    import numpy as np

    if not 0 < share < 1:
        raise ValueError(f"validation share is {share}, expected 0 < share < 1")
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
    """The first `limit` samples of an order that `seed` fixes, or all where there are fewer.

    Raises:
        ValueError: limit is below 1, or seed below 0.
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
