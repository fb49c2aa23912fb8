"""What a recording holds: events, times, rates over time, hot pixels."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from multifire.events.hot_pixels import hot_pixels
from multifire.events.recording import Recording, check_side

RATE_STEPS = 512
"""Maximum number of equal parts of time for which events are counted."""


class Overview(NamedTuple):
    """Figures of a recording."""

    format: str
    sensor_size: tuple[int, int] | None
    """(H, W) in pixels; None if it is unknown."""
    events: int
    on_events: int
    """Events of polarity 1."""
    first_us: int
    last_us: int
    pixel_counts: np.ndarray
    """Number of events of each pixel, int64 [H, W]; [0, 0] if the sensor's size is unknown."""
    rates: np.ndarray
    """Events per second in equal parts of time, float64 [parts, 2]; OFF, then ON."""

    @property
    def seconds(self) -> float:
        return max(self.last_us - self.first_us, 1) / 1e6

    def hot_pixels(self) -> list[tuple[int, int, int]]:
        """Return column, row and number of events of each hot pixel, the busiest first."""
        rows, columns = np.nonzero(hot_pixels(self.pixel_counts)) if self.pixel_counts.size else ((), ())
        found = [(int(x), int(y), int(self.pixel_counts[y, x])) for y, x in zip(rows, columns, strict=True)]
        return sorted(found, key=lambda pixel: -pixel[2])


def look_over(factory: Callable[[], Recording], parts: int = 60) -> Overview:
    """Read a recording twice, for its times and for its rates.

    Args:
        factory: opens the recording; called for each pass.
        parts: number of equal parts of time of `Overview.rates`, at most RATE_STEPS.

    Raises:
        ValueError: a damaged recording.
    """
    events = on_events = 0
    first, last = 1 << 62, -(1 << 62)
    with factory() as recording:
        if recording.sensor_size:
            check_side(recording.name, recording.sensor_size)
        height, width = recording.sensor_size or (0, 0)
        counts = np.zeros(height * width, np.int64)
        for t, pixel in recording.packed():
            events, on_events = events + len(t), on_events + int(np.count_nonzero(pixel & 1))
            first, last = min(first, int(t[0])), max(last, int(t[-1]))
            if len(counts):
                counts += np.bincount(pixel >> 1, minlength=len(counts))
        format, size = recording.format, recording.sensor_size
    rates = _rates(factory, first, last, min(parts, RATE_STEPS))
    return Overview(format, size, events, on_events, first, last, counts.reshape(height, width), rates)


def _rates(factory: Callable[[], Recording], first: int, last: int, parts: int) -> np.ndarray:
    counts = np.zeros(parts * 2, np.int64)
    span = last - first + 1
    with factory() as recording:
        recording.quiet = True
        for t, pixel in recording.packed():
            part = np.minimum((t - first) * (parts / span), parts - 1).astype(np.int64)
            counts += np.bincount(part * 2 + (pixel & 1), minlength=len(counts))
    return counts.reshape(parts, 2) / (span / parts / 1e6)
