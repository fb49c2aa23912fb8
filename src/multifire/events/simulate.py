"""Simulate the events of a camera that moves over a picture in three saccades.

N-MNIST was recorded in this way with a real camera on a motor, CIFAR10-DVS with pictures moving on a screen. These
events are simulated; say so wherever they are shown.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from multifire.events.frames import FrameOptions, frames_of_windows
from multifire.events.recording import EVENT_DTYPE, Packed, Recording

BATCH = 32
TRIANGLE = np.array([(0.0, 0.0), (1.0, 0.5), (0.0, 1.0), (0.0, 0.0)])
"""Corners of the path of the gaze as (row, column), in units of the amplitude: three saccades, a closed triangle."""


@dataclass(frozen=True)
class SaccadeOptions:
    """The camera and its motion; with the defaults a digit has about as many events as in N-MNIST."""

    sensor_size: tuple[int, int] = (34, 34)
    """H, W in pixels; the picture lies in the middle, and its border is continued."""
    duration_us: int = 300_000
    """Duration of the three saccades together, µs."""
    steps: int = 100
    """Number of moments at which the light is computed; its logarithm is linear between two of them."""
    amplitude: float = 4.0
    """Length of a saccade's longer side, in pixels."""
    dark: float = 0.1
    """Light of a black pixel; that of a white one is 1 + dark."""
    threshold: float = 0.35
    """Change of log intensity that makes an event."""
    threshold_spread: float = 0.03
    """Standard deviation of the threshold between pixels."""
    noise_hz: float = 0.5
    """Noise events per pixel and second."""

    def __post_init__(self):
        if min(*self.sensor_size, self.duration_us, self.steps) < 1 or self.dark <= 0 or self.threshold <= 0:
            raise ValueError(f"{self}: sensor_size, duration_us, steps, dark and threshold must be above 0")
        if min(self.amplitude, self.threshold_spread, self.noise_hz) < 0:
            raise ValueError(f"{self}: amplitude, threshold_spread and noise_hz must be at least 0")


def simulate_events(
    images: np.ndarray, options: SaccadeOptions | None = None, seed: int = 0, first: int = 0
) -> Iterator[np.ndarray]:
    """Yield the simulated events of each picture.

    The gaze g(t) runs along the sides of a triangle, each with g = a + (b − a)·(1 − cos πu)/2, u = 0..1. A pixel r sees
    L(t) = ln(I(r + g(t)) + dark), I interpolated bilinearly, and remembers a level M, at first L(0). Whenever
    |L − M| reaches its threshold θ_r it makes an event of polarity p = [L > M], and M moves by θ_r towards L.
    θ_r is normal with mean θ; noise is a Poisson process. There is no refractory time and no latency.

    Args:
        images: uint8 [N, H, W], not larger than the sensor.
        seed: with the picture's number, decides its thresholds and noise.
        first: number of the first picture.

    Yields:
        EVENT_DTYPE [events of the picture], non-decreasing in t.

    Raises:
        ValueError: other shapes or types, or a negative seed.
    """
    options = options or SaccadeOptions()
    for t, pixel in _simulate(images, options, seed, first):
        events = np.empty(len(t), EVENT_DTYPE)
        y, x = np.divmod(pixel >> 1, options.sensor_size[1])
        events["t"], events["x"], events["y"], events["p"] = t, x, y, pixel & 1
        yield events


def simulate_frames(
    images: np.ndarray,
    frames: FrameOptions,
    options: SaccadeOptions | None = None,
    seed: int = 0,
    first: int = 0,
) -> np.ndarray:
    """Return frames uint8 [N, T, 2, H, W] of the pictures' simulated events, saturating at 255.

    Arguments and errors are those of `simulate_events` and `to_frames`.
    """
    options = options or SaccadeOptions()
    out = np.zeros((len(images), frames.timesteps, 2, *frames.size), np.uint8)
    for number, packed in enumerate(_simulate(images, options, seed, first)):
        out[number] = frames_of_windows(lambda: _recording(packed, options), [(None, None)], frames)[0].counts  # noqa: B023 - called at once
    return out


def simulate_recording(image: np.ndarray, options: SaccadeOptions | None = None, seed: int = 0) -> Recording:
    """Return the simulated events of a picture, uint8 [H, W], as a recording; arguments are those of `simulate_events`.

    Raises:
        ValueError: another shape or type, or a negative seed.
    """
    options = options or SaccadeOptions()
    (packed,) = _simulate(image[None], options, seed, 0)
    return _recording(packed, options)


def _recording(packed: Packed, options: SaccadeOptions) -> Recording:
    return Recording("simulated events", "simulated", options.sensor_size, iter((packed,)), allow_empty=True)


def _simulate(images: np.ndarray, options: SaccadeOptions, seed: int, first: int) -> Iterator[Packed]:
    height, width = options.sensor_size
    if images.ndim != 3 or images.dtype != np.uint8 or images.shape[1] > height or images.shape[2] > width:
        raise ValueError(
            f"images are {images.dtype} {list(images.shape)}, expected uint8 [N, H, W] of at most {height} × {width}"
        )
    if seed < 0:
        raise ValueError(f"seed is {seed}, expected at least 0")
    for start in range(0, len(images), BATCH):
        batch = images[start : start + BATCH]
        rngs = [np.random.default_rng([seed, first + start + number]) for number in range(len(batch))]
        yield from _simulate_batch(batch, options, rngs)


def _simulate_batch(images: np.ndarray, options: SaccadeOptions, rngs: list[np.random.Generator]) -> Iterator[Packed]:
    pixels = options.sensor_size[0] * options.sensor_size[1]
    thresholds = np.stack([_thresholds(rng, options) for rng in rngs])
    parts = [_noise(rng, options, number * pixels) for number, rng in enumerate(rngs)]
    memory = before = None
    step_us = options.duration_us / options.steps
    for step, light in enumerate(_lights(images, options)):
        level = np.log(light + np.float32(options.dark)).reshape(len(images), -1)
        if memory is None or before is None:
            memory, before = level.copy(), level
            continue
        parts.append(_crossings(memory, before, level, thresholds, (step - 1) * step_us, step_us))
        before = level
    t, place = (np.concatenate(column) for column in zip(*parts, strict=True))
    sample = place // (2 * pixels)
    order = np.lexsort((t, sample))
    t, place = t[order], place[order]
    ends = np.searchsorted(sample[order], np.arange(len(images) + 1))
    for number in range(len(images)):
        mine = slice(ends[number], ends[number + 1])
        yield Packed(t[mine], place[mine] - number * 2 * pixels)


def _thresholds(rng: np.random.Generator, options: SaccadeOptions) -> np.ndarray:
    height, width = options.sensor_size
    drawn = rng.normal(options.threshold, options.threshold_spread, height * width)
    return np.maximum(drawn, options.threshold / 10).astype(np.float32)


def _noise(rng: np.random.Generator, options: SaccadeOptions, offset: int) -> tuple[np.ndarray, np.ndarray]:
    """Return times and places (pixel·2 + p, with pixels numbered through the batch) of noise events."""
    pixels = options.sensor_size[0] * options.sensor_size[1]
    count = rng.poisson(options.noise_hz * pixels * options.duration_us / 1e6)
    return rng.integers(0, options.duration_us, count), offset * 2 + rng.integers(0, 2 * pixels, count)


def _lights(images: np.ndarray, options: SaccadeOptions) -> Iterator[np.ndarray]:
    """Yield the light on the sensor at each moment, [N, H, W] in 0..1."""
    (height, width), (rows, columns) = options.sensor_size, images.shape[1:]
    gaze = _gaze(options)
    reach = int(np.ceil(np.abs(gaze).max())) + 1
    top, left = (height - rows) // 2, (width - columns) // 2
    around = ((reach + top, reach + height - rows - top), (reach + left, reach + width - columns - left))
    scene = np.pad(images, ((0, 0), *around), mode="edge").astype(np.float32) / np.float32(255)
    whole = np.floor(gaze).astype(int)
    for (row, column), (down, right) in zip(whole + reach, (gaze - whole).astype(np.float32), strict=True):
        seen = scene[:, row : row + height + 1, column : column + width + 1]
        seen = seen[:, :-1] + down * (seen[:, 1:] - seen[:, :-1])
        yield seen[:, :, :-1] + right * (seen[:, :, 1:] - seen[:, :, :-1])


def _gaze(options: SaccadeOptions) -> np.ndarray:
    """Return the displacement (row, column) of the gaze at each moment, [steps + 1, 2], centred on the triangle."""
    time = 3 * np.arange(options.steps + 1) / options.steps
    side = np.minimum(time.astype(int), 2)
    eased = ((1 - np.cos(np.pi * (time - side))) / 2)[:, None]
    corners = options.amplitude * (TRIANGLE - TRIANGLE.max(0) / 2)
    return corners[side] + eased * (corners[side + 1] - corners[side])


def _crossings(
    memory: np.ndarray, before: np.ndarray, level: np.ndarray, thresholds: np.ndarray, start_us: float, step_us: float
) -> tuple[np.ndarray, np.ndarray]:
    """Return times and places of the events between two moments; update `memory` [N, pixels]."""
    crossed = np.trunc((level - memory) / thresholds)
    where = np.flatnonzero(crossed)
    steps = crossed.ravel()[where]
    times = np.abs(steps).astype(np.int64)
    which = np.repeat(where, times)
    nth = np.arange(1, len(which) + 1) - np.repeat(np.cumsum(times) - times, times)
    sign = np.repeat(np.sign(steps), times)
    reached = memory.ravel()[which] + sign * nth * thresholds.ravel()[which]
    rise = level.ravel()[which] - before.ravel()[which]
    rise[rise == 0] = 1  # rounding alone left the memory a threshold behind
    share = (reached - before.ravel()[which]) / rise
    memory.ravel()[where] += steps * thresholds.ravel()[where]
    t = start_us + np.clip(share, 0, 1) * (step_us - 1)
    return t.astype(np.int64), which * 2 + (sign > 0)
