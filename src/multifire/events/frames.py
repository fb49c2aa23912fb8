"""Convert events to frames: the number of events of each polarity in each cell and slice of time."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import DTypeLike

from multifire.events.hot_pixels import find_hot_pixels
from multifire.events.recording import EVENT_DTYPE, Packed, Recording, check_side, pack
from multifire.utils.log import log

Slicing = Literal["duration", "time", "count"]
Fit = Literal["stretch", "pad", "crop"]
HotPixels = Literal["keep", "drop"]
Window = tuple[int | None, int | None]
"""Start (inclusive) and end (exclusive) in µs; None is the start or end of the recording."""

FOREVER = 1 << 62
SLICE_EVENTS = 1 << 15  # events of an array that are processed at a time


@dataclass(frozen=True)
class FrameOptions:
    """Options for frames [T, 2, H, W] with row = y, column = x, channel = p.

    Raises:
        ValueError: an option is unknown or out of range.
    """

    size: tuple[int, int] = (32, 32)
    """H, W of a frame, in cells."""
    timesteps: int = 40
    """T, the number of slices of time."""
    slicing: Slicing = "duration"
    """"duration": slices of duration_us from the window's first event on; "time": equal times between its first and
    last event; "count": equal numbers of events, which differ by at most one."""
    duration_us: int = 30_000
    """Length of a slice in µs, for "duration"."""
    binary: bool = False
    """Store 0 or 1 in a cell instead of the number of events."""
    factor: float | None = None
    """Pixels for each cell, may be fractional. None: sensor size / frame size, exactly."""
    fit: Fit = "stretch"
    """How a sensor of another aspect than the frame's fills it. "stretch": cells have another aspect than pixels;
    "pad": the sensor lies in the middle of a larger one without events; "crop": only the sensor's middle is counted."""
    flip_x: bool = False
    """Turn every frame left to right."""
    flip_y: bool = False
    """Turn every frame upside down."""
    hot_pixels: HotPixels = "keep"
    """"drop": leave out the events of a recording's hot pixels; see `find_hot_pixels`."""

    def __post_init__(self):
        for name, known in (("slicing", Slicing), ("fit", Fit), ("hot_pixels", HotPixels)):
            if getattr(self, name) not in get_args(known):
                raise ValueError(f"{name} is {getattr(self, name)!r}, expected one of {', '.join(get_args(known))}")
        if min(*self.size, self.timesteps, self.duration_us) < 1:
            raise ValueError(
                f"size {self.size}, timesteps {self.timesteps} and duration_us {self.duration_us} must be at least 1"
            )
        if self.factor is not None and not 0 < self.factor < float("inf"):
            raise ValueError(f"factor is {self.factor}, expected more than 0")


class Frames(NamedTuple):
    """The frames of one window."""

    counts: np.ndarray
    """uint8 [T, 2, H, W], saturating at 255."""
    clipped: int
    """Number of cells with more than 255 events."""
    events: int
    """Number of events in the frames; 0 only for a window without events."""
    first_us: int
    """Time of the window's first event; 0 without events."""
    last_us: int
    """Time of the window's last event, which may lie after the last slice; 0 without events."""


def to_frames(
    events: np.ndarray,
    sensor_size: tuple[int, int] = (128, 128),
    size: tuple[int, int] = (32, 32),
    duration_us: int = 30_000,
    timesteps: int = 40,
    *,
    slicing: Slicing = "duration",
    binary: bool = False,
    factor: float | None = None,
    dtype: DTypeLike = np.int32,
) -> np.ndarray:
    """Convert an array of events to frames.

        frames[k, p, r, c] = number of events of polarity p in slice k with ⌊y / factor⌋ = r and ⌊x / factor⌋ = c

    The quotient is floored exactly like Python's `//`, with the factor as a double: 76 // 3.04 is 24, because the
    nearest double is above 3.04.

    Args:
        events: structured array with fields t in µs, x, y, p, as `read_events` returns it.
        sensor_size: H, W of the sensor in pixels.
        size, duration_us, timesteps, slicing, binary, factor: see `FrameOptions`.
        dtype: an integer type; counts saturate at its largest number, with a warning that says how many.

    Returns:
        [T, 2, H, W] of that type.

    Raises:
        ValueError: an event outside the sensor, other fields, or options that do not fit.
    """
    limits = np.iinfo(dtype)
    _check_fields(events)
    options = FrameOptions(size, timesteps, slicing, duration_us, binary, factor)
    window = _count(lambda: _from_array(events, sensor_size), [(None, None)], options)[0]
    clipped = int(np.count_nonzero(window.counts > limits.max))
    if clipped:
        log.warning("%s cells hold more than %s events and were clipped", f"{clipped:,}", f"{limits.max:,}")
    return np.minimum(window.counts, limits.max).astype(dtype)


def frames_of_windows(
    recording_factory: Callable[[], Recording], windows: Sequence[Window], options: FrameOptions
) -> list[Frames]:
    """Convert several windows of a recording to frames in one pass, in memory that does not grow with the recording.

    "time" and "count" need a pass before that for each window's totals, and so does a recording whose time runs
    backwards. Only "count" on such a recording sorts all events in memory.

    Args:
        recording_factory: opens the recording; called for each pass.
        windows: [start_us, end_us) of each window; windows may overlap.

    Raises:
        ValueError: a damaged recording, an unknown sensor size, or options that do not fit.
    """
    factory = _without_hot_pixels(recording_factory) if options.hot_pixels == "drop" else recording_factory
    return [
        Frames(
            counts=np.minimum(window.counts, 255).astype(np.uint8),
            clipped=int(np.count_nonzero(window.counts > 255)),
            events=window.events,
            first_us=window.first if window.seen else 0,
            last_us=window.last if window.seen else 0,
        )
        for window in _count(factory, windows, options)
    ]


def _without_hot_pixels(factory: Callable[[], Recording]) -> Callable[[], Recording]:
    """Return a factory of the same recording without the events of its hot pixels, which takes a pass to find."""
    with factory() as recording:
        recording.quiet = True
        hot_HW = find_hot_pixels(recording)
    count = int(np.count_nonzero(hot_HW))
    if count:
        log.info("%s: leaves out %s hot pixels", recording.name, f"{count:,}")

    def open_without() -> Recording:
        recording = factory()
        recording.drop_pixels(hot_HW)
        return recording

    return open_without


class _Backwards(Exception):
    """The first event of the file is not the first in time."""


class _Window:
    """A window, its totals, and its counts so far [T, 2, H, W] int64."""

    def __init__(self, window: Window, options: FrameOptions):
        start, end = window
        self.start = -FOREVER if start is None else start
        self.end = FOREVER if end is None else end
        self.first, self.last = FOREVER, -FOREVER
        self.total = 0
        """Number of events of the window, if an earlier pass has counted them."""
        self.seen = 0
        self.events = 0
        self.edges: np.ndarray | None = None
        self.counts = np.zeros((options.timesteps, 2, *options.size), np.int64)

    def bounds(self, t: np.ndarray) -> tuple[int, int]:
        """Return the range of the sorted times that lie in the window."""
        if t[-1] < self.start or t[0] >= self.end:
            return 0, 0
        low, high = np.searchsorted(t, (self.start, self.end))
        return int(low), int(high)

    def note(self, t: np.ndarray) -> None:
        if len(t):
            self.first, self.last = min(self.first, int(t[0])), max(self.last, int(t[-1]))

    def slices(self, t: np.ndarray, options: FrameOptions) -> np.ndarray:
        """Return the T + 1 positions in the sorted times at which slices begin or end."""
        if options.slicing == "count":
            ranks = -(-np.arange(options.timesteps + 1) * self.total // options.timesteps)
            return np.clip(ranks - self.seen, 0, len(t))
        if self.edges is None:
            self.edges = self._edges(options)
        return np.searchsorted(t, self.edges)

    def _edges(self, options: FrameOptions) -> np.ndarray:
        """Return the T + 1 times at which slices begin or end, rounded up to µs."""
        span = options.timesteps * options.duration_us
        if options.slicing == "time":
            span = self.last - self.first + 1
        edges = (self.first - -k * span // options.timesteps for k in range(options.timesteps + 1))
        return np.array([min(edge, FOREVER) for edge in edges])


def _count(factory: Callable[[], Recording], windows: Sequence[Window], options: FrameOptions) -> list[_Window]:
    if options.slicing == "duration":
        try:
            return _fill(factory, [_Window(window, options) for window in windows], options, totals_known=False)
        except _Backwards:
            pass
    measured = [_Window(window, options) for window in windows]
    with factory() as recording:
        recording.quiet = True
        for t, _ in recording.packed():
            for window in measured:
                low, high = window.bounds(t)
                window.note(t[low:high])
                window.total += high - low
    ordered = _sorted(factory) if recording.backwards and options.slicing == "count" else factory
    return _fill(ordered, measured, options, totals_known=True)


def _fill(
    factory: Callable[[], Recording], windows: list[_Window], options: FrameOptions, totals_known: bool
) -> list[_Window]:
    with factory() as recording:
        if recording.sensor_size is None:
            raise ValueError(f"{recording.name}: does not say its sensor's size; open it with sensor_size=(H, W)")
        check_side(recording.name, recording.sensor_size)
        cells = cells_of(recording.sensor_size, options)
        for t, pixel in recording.packed():
            for window in windows:
                low, high = window.bounds(t)
                if low < high:
                    if not totals_known:
                        if window.seen and t[low] < window.first:
                            raise _Backwards
                        window.note(t[low:high])
                    _add(window, t[low:high], pixel[low:high], cells, options)
    if options.binary:
        for window in windows:
            np.minimum(window.counts, 1, out=window.counts)
    return windows


def _add(window: _Window, t: np.ndarray, pixel: np.ndarray, cells: np.ndarray, options: FrameOptions) -> None:
    edges = window.slices(t, options)
    window.seen += len(t)
    held = np.diff(edges)
    busy = np.flatnonzero(held)
    if not len(busy):
        return
    first, behind = int(busy[0]), int(busy[-1]) + 1
    index = cells.take(pixel[edges[first] : edges[behind]])
    per_slice = window.counts[0].size + 1  # the last one counts events beside the frame
    if behind - first > 1:
        index += np.repeat(np.arange(behind - first) * per_slice, held[first:behind])
    counted = np.bincount(index, minlength=(behind - first) * per_slice).reshape(behind - first, per_slice)[:, :-1]
    window.counts[first:behind] += counted.reshape(behind - first, *window.counts.shape[1:])
    window.events += int(counted.sum())


def cells_of(sensor_size: tuple[int, int], options: FrameOptions) -> np.ndarray:
    """Return the index into a flattened frame [2, H, W] of each `Packed.pixel`; 2·H·W for pixels beside the frame.

    Raises:
        ValueError: with the options' factor the sensor has more cells than a frame.
    """
    height, width = options.size
    rows, columns = (
        _bins(pixels, fitted, cells, options.factor)
        for pixels, fitted, cells in zip(sensor_size, fitted_size(sensor_size, options), options.size, strict=True)
    )
    inside = (rows >= 0)[:, None, None] & (columns >= 0)[:, None]
    rows, columns = height - 1 - rows if options.flip_y else rows, width - 1 - columns if options.flip_x else columns
    cell = rows[:, None, None] * width + columns[:, None] + np.arange(2) * height * width
    return np.where(inside, cell, 2 * height * width).ravel().astype(np.intp)


def fitted_size(sensor_size: tuple[int, int], options: FrameOptions) -> tuple[int, int]:
    """Return (H, W) of the area, with the sensor in its middle, that fills a frame."""
    if options.fit == "stretch":
        return sensor_size
    ratios = [Fraction(pixels, cells) for pixels, cells in zip(sensor_size, options.size, strict=True)]
    scale = max(ratios) if options.fit == "pad" else min(ratios)
    height, width = (math.ceil(scale * cells) for cells in options.size)
    return height, width


def say_fit(sensor_size: tuple[int, int], options: FrameOptions) -> str:
    """Return what becomes of a sensor whose aspect is not the frame's; empty if it has the same."""
    if len({Fraction(pixels, cells) for pixels, cells in zip(sensor_size, options.size, strict=True)}) == 1:
        return ""
    height, width = fitted_size(sensor_size, options)
    how = {"stretch": "stretched", "pad": f"padded to {width}×{height}", "crop": f"cropped to {width}×{height}"}
    return f"{how[options.fit]} to fill frames of {options.size[1]}×{options.size[0]}"


def _bins(sensor: int, fitted: int, cells: int, factor: float | None) -> np.ndarray:
    """Return the cell of each pixel of a side; -1 beside the frame."""
    pixels = np.arange(sensor) + (fitted - sensor) // 2
    inside = (pixels >= 0) & (pixels < fitted)
    if factor is None:
        return np.where(inside, pixels * cells // fitted, -1)
    bins = np.where(inside, pixels // factor, -1).astype(np.int64)
    if bins.max() >= cells:
        raise ValueError(
            f"a factor of {factor} makes {bins.max() + 1} cells of {fitted} pixels, more than the frame's {cells}; "
            "choose a larger factor or size"
        )
    return bins


def _check_fields(events: Any) -> None:
    fields = getattr(getattr(events, "dtype", None), "fields", None) or {}
    if any(name not in fields or fields[name][0].kind not in "iub" for name in EVENT_DTYPE.names or ()):
        found = getattr(events, "dtype", type(events).__name__)
        raise ValueError(f"events are {found}, expected an array with fields t, x, y, p of whole numbers")


def _from_array(events: np.ndarray, sensor_size: tuple[int, int]) -> Recording:
    return Recording("events", "array", sensor_size, _pack_array(events, sensor_size), allow_empty=True)


def _pack_array(events: np.ndarray, sensor_size: tuple[int, int]) -> Iterator[Packed]:
    for first in range(0, len(events), SLICE_EVENTS):
        part = events[first : first + SLICE_EVENTS]
        t = part["t"].astype(np.int64)
        x, y, p = (part[name].astype(np.result_type(part[name], np.int32)) for name in ("x", "y", "p"))
        if min(x.min(), y.min(), p.min()) < 0 or p.max() > 1:
            wrong = int(np.argmax((x < 0) | (y < 0) | (p < 0) | (p > 1)))
            raise ValueError(f"event {first + wrong:,} is {part[wrong]}, expected x, y >= 0 and p 0 or 1")
        yield pack("events", sensor_size, first, t, x, y, p)


def _sorted(factory: Callable[[], Recording]) -> Callable[[], Recording]:
    """Return a factory of the recording sorted by time, in one chunk."""
    with factory() as recording:
        t, pixel = (np.concatenate(column) for column in zip(*recording.packed(), strict=True))
    order = np.argsort(t, kind="stable")
    packed = Packed(t[order], pixel[order])
    return lambda: Recording(recording.name, recording.format, recording.sensor_size, iter((packed,)))
