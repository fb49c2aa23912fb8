"""Cut a recording into consecutive pictures of equal time, one in memory at a time."""

import itertools
from collections.abc import Iterator

import numpy as np

from multifire.events.frames import FrameOptions, cells_of
from multifire.events.recording import Recording, check_side


def slices_of(recording: Recording, options: FrameOptions, first_us: int, slice_us: float) -> Iterator[np.ndarray]:
    """Yield the event counts int64 [2, H, W] of each slice of `slice_us` µs from `first_us` on, to the last event.

    Options of time are not used. Where time runs backwards, events are counted in the slice of the latest time so far.

    Raises:
        ValueError: a damaged recording, or an unknown sensor size.
    """
    if recording.sensor_size is None:
        raise ValueError(f"{recording.name}: does not state its sensor's size; give it with --sensor, such as 346x260")
    check_side(recording.name, recording.sensor_size)
    cells = cells_of(recording.sensor_size, options)
    height, width = options.size
    counts = np.zeros(2 * height * width + 1, np.int64)
    current = 0
    for t, pixel in recording.packed():
        number = np.maximum(((t - first_us) // slice_us).astype(np.int64), current)
        edges = [0, *(np.flatnonzero(np.diff(number)) + 1), len(number)]
        for start, end in itertools.pairwise(edges):
            while current < number[start]:
                yield counts[:-1].reshape(2, height, width)
                counts, current = np.zeros_like(counts), current + 1
            counts += np.bincount(cells.take(pixel[start:end]), minlength=len(counts))
    yield counts[:-1].reshape(2, height, width)
