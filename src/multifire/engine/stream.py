"""Run a trained network on a stream of frames and print a prediction after each frame.

Shapes: T time steps, N samples, C channels, H height, W width, L classes.
"""

import contextlib
import time
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from rich.live import Live

from multifire.analysis.evaluate import check_margin
from multifire.config import DataConfig
from multifire.datasets import DatasetInfo, describe, input_size
from multifire.datasets.arrays import normalise
from multifire.datasets.cache import frame_options
from multifire.datasets.pictures import SUFFIXES, Options, decode
from multifire.engine.networks import EngineChoice, StreamNetwork, open_network
from multifire.events import Recording, frames_of_windows, open_recording
from multifire.events.hot_pixels import find_hot_pixels
from multifire.events.live import LiveFrame, LiveFrames, Records, UdpRecords
from multifire.events.recording import Packed, Stray
from multifire.utils.log import log
from multifire.utils.progress import CONSOLE

MAX_LATENCIES = 10_000
"""Number of latencies that are kept for quantiles."""


class Prediction(NamedTuple):
    """Prediction from the frames of a sample up to now."""

    sample: int
    """Number of the sample; the first is 1."""
    step: int
    """Number of the sample's frames up to now."""
    label: int
    probability: float
    """Softmax of the mean logits for this class."""
    margin: float
    """Probability of this class minus that of the second class."""
    seconds: float
    """Time from the complete frame to the prediction, in seconds."""
    final: bool
    """True if the sample is complete or its margin exceeds the threshold; the next frame begins a new sample."""


def classify(
    network: StreamNetwork, frames: Iterable[np.ndarray], timesteps: int, margin: float | None = None
) -> Iterator[Prediction]:
    """Run the network on `frames` [C, H, W] one by one and yield a prediction after each.

    Args:
        network: the network.
        frames: the stream.
        timesteps: number of frames of a sample; membranes start at zero for each sample.
        margin: end a sample early, when the margin of its prediction exceeds this value.
    """
    network.reset()
    sample, step = 1, 0
    for frame in frames:
        start = time.perf_counter()
        logits_L = network.step(frame)
        label, probability, found_margin = _decide(logits_L)
        seconds = time.perf_counter() - start
        step += 1
        final = step == timesteps or (margin is not None and found_margin > margin)
        yield Prediction(sample, step, label, probability, found_margin, seconds, final)
        if final:
            network.reset()
            sample, step = sample + 1, 0


def _decide(logits_L: np.ndarray) -> tuple[int, float, float]:
    """Return the first class, its softmax, and its margin over the second class."""
    odds_L = np.exp(logits_L - logits_L.max())
    label = int(logits_L.argmax())
    second, first = np.sort(odds_L)[-2:] / odds_L.sum()
    return label, float(first), float(first - second)


class Latencies:
    """Collects latencies of frames; quantiles are those of the newest MAX_LATENCIES."""

    def __init__(self):
        self.frames = 0
        self._newest: deque[float] = deque(maxlen=MAX_LATENCIES)

    def add(self, seconds: float) -> None:
        self.frames += 1
        self._newest.append(seconds)

    def quantiles(self) -> tuple[float, float, float]:
        """Return median, 99th percentile and maximum, in seconds."""
        median, high, largest = np.quantile(self._newest, (0.5, 0.99, 1.0)).tolist()
        return median, high, largest


def frames_of(path: Path, cfg: DataConfig, info: DatasetInfo) -> Iterator[np.ndarray]:
    """Return the frames [C, H, W] of a recording, picture, .npy array or folder of arrays, prepared as in training.

    With slicing by duration, a recording is cut into consecutive samples while it is read, in bounded memory; the last
    sample is filled up with empty frames. With slicing by time or count, the whole recording is one sample. A picture
    is stretched to the network's size, and shown at every time step.

    Raises:
        FileNotFoundError: no such file.
        ValueError: unknown format, damaged, or another kind of input than the network's.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder")
    if path.is_dir() or (path.suffix == ".npy" and not (info.events and _holds_events(path))):
        return _frames_of_arrays(path, cfg, info)
    if not info.events:
        return _frames_of_picture(path, cfg, info)
    if cfg.slicing == "duration":
        return (frame.counts for frame in _frames_of_recording(path, cfg, info))
    frames = frames_of_windows(lambda: _open(path, info, cfg), [(None, None)], frame_options(cfg))[0]
    return iter(frames.counts)


def _holds_events(path: Path) -> bool:
    """Return True for an array of events: a structured one, or rows of four numbers."""
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError, OSError):
        return False
    return bool(array.dtype.names) or (array.ndim == 2 and array.shape[1] == 4)


def _open(path: Path, info: DatasetInfo, cfg: DataConfig) -> Recording:
    """Open a recording; if the file does not contain the sensor size, use that of the run's data set."""
    recording = open_recording(path, stray=cfg.stray)
    if recording.sensor_size is not None:
        return recording
    recording.close()
    return open_recording(path, sensor_size=info.height_width, stray=cfg.stray)


def _frames_of_recording(path: Path, cfg: DataConfig, info: DatasetInfo) -> Iterator[LiveFrame]:
    hot_HW = None
    if cfg.hot_pixels == "drop":
        with _open(path, info, cfg) as recording:
            recording.quiet = True
            hot_HW = find_hot_pixels(recording)
    with _open(path, info, cfg) as recording:
        assert recording.sensor_size
        if hot_HW is not None:
            recording.drop_pixels(hot_HW)
        live = LiveFrames(recording.sensor_size, frame_options(cfg), str(path))
        yield from follow(live, recording.packed())


def open_stream(port: int | None, file: BinaryIO, info: DatasetInfo, stray: Stray) -> UdpRecords | Records:
    """Open a stream of events from a UDP port of this machine or, if `port` is None, from an open file.

    The sensor size is that of the run's data set; events beside it are refused or dropped as in training.

    Raises:
        ValueError: the network was not trained on events, or there is no such port.
        OSError: another program uses the port.
    """
    if not info.events:
        raise ValueError(
            "this run was trained on images, expected events to follow; play a picture, an .npy file or a folder of "
            "them"
        )
    size = info.height_width
    return Records(file, size, "standard input", stray) if port is None else UdpRecords(port, size, stray)


def follow(live: LiveFrames, chunks: Iterable[Packed]) -> Iterator[LiveFrame]:
    """Yield frames while events arrive, then the remaining incomplete ones; log the number of late events."""
    for chunk in chunks:
        yield from live.push(chunk)
    yield from live.finish()
    if live.late:
        log.warning("skipped %s events that came after their frame was complete", f"{live.late:,}")


def _frames_of_arrays(path: Path, cfg: DataConfig, info: DatasetInfo) -> Iterator[np.ndarray]:
    if not path.is_dir():
        yield from _frames_of_array(_read_array(path, cfg, info), cfg, info, path)
        return
    files = sorted(path.glob("*.npy"))
    if not files:
        raise ValueError(f"{path}: contains no .npy file, expected one for each frame, in the order of their names")
    for file in files:
        yield from _normalised(_read_array(file, cfg, info), info, file)


def _frames_of_picture(path: Path, cfg: DataConfig, info: DatasetInfo) -> Iterator[np.ndarray]:
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(
            f"{path}: this run was trained on images ({cfg.name}), expected a picture ({', '.join(SUFFIXES)}), an .npy "
            "file or a folder of them"
        )
    if info.channels not in (1, 3):
        raise ValueError(f"{path}: this run's images have {info.channels} channels, expected an .npy file of them")
    return _frames_of_array(decode(path, Options(input_size(cfg, info), info.channels)), cfg, info, path)


def _frames_of_array(array: np.ndarray, cfg: DataConfig, info: DatasetInfo, path: Path) -> Iterator[np.ndarray]:
    """Yield the frames of an array; a still image is shown at every time step, as in training."""
    for _ in range(cfg.timesteps if array.ndim == 3 and not info.events else 1):
        yield from _normalised(array, info, path)


def _read_array(file: Path, cfg: DataConfig, info: DatasetInfo) -> np.ndarray:
    """Map an array [T, C, H, W] or [C, H, W] into memory."""
    try:
        array = np.load(file, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise ValueError(f"{file}: not an .npy array of numbers ({' '.join(str(error).split())})") from None
    shape = (info.channels, *input_size(cfg, info))
    if array.dtype.kind not in "uif" or array.ndim not in (3, 4) or array.shape[-3:] != shape:
        raise ValueError(
            f"{file}: {array.dtype} {list(array.shape)}, expected numbers [T, C, H, W] with C, H, W = "
            f"{list(shape)}, or one frame [C, H, W]"
        )
    return array


def _normalised(array: np.ndarray, info: DatasetInfo, file: Path) -> Iterator[np.ndarray]:
    """Yield frames [C, H, W] in fp32; integer pixels of images are normalised as in training, other values kept."""
    holds_pixels = not info.events and array.dtype.kind != "f"
    for frame_CHW in array.reshape(-1, *array.shape[-3:]):
        x_CHW = normalise(frame_CHW, info) if holds_pixels else frame_CHW.astype(np.float32)
        if not np.isfinite(x_CHW).all():
            raise ValueError(f"{file}: contains NaN or infinity, expected finite numbers")
        yield x_CHW


class Player:
    """Prints the predictions for a stream: one line per frame or, on a terminal, per sample, updated in place."""

    def __init__(
        self, source: Path, which: str | None, device: str, margin: float | None, choice: EngineChoice = "auto"
    ):
        """Open the network of a run or of an exported int8 file.

        Raises:
            FileNotFoundError: no such run, checkpoint or file.
            ValueError: no such device, an invalid margin, or a network that the chosen engine does not compute.
            RuntimeError: the native engine is not built.
        """
        if margin is not None:
            check_margin(margin)
        self.network, self.cfg, self.about = open_network(source, which, device, choice)
        self.info, self.margin = describe(self.cfg.data), margin
        self.latencies = Latencies()
        self.decisions = 0

    def play(self, source: Path) -> None:
        """Print the predictions for a recording."""
        self._show(frames_of(source, self.cfg.data, self.info))
        if not self.latencies.frames:
            log.warning("%s: holds no frame", source)

    def follow(self, file: BinaryIO, port: int | None) -> None:
        """Print the predictions for events from a UDP port or, if `port` is None, from an open file, until they end."""
        with open_stream(port, file, self.info, self.cfg.data.stray) as records:
            live = LiveFrames(self.info.height_width, frame_options(self.cfg.data), "a stream")
            if self.cfg.data.hot_pixels == "drop":
                log.warning("hot pixels are told from a whole recording, so those of a stream are not left out")
            CONSOLE.print(f"following {records.name}; Ctrl-C ends", highlight=False, markup=False)
            self._show(frame.counts for frame in follow(live, records))

    def _show(self, frames: Iterator[np.ndarray]) -> None:
        CONSOLE.print(f"engine: {self.about}", highlight=False, markup=False)
        blank_CHW = np.zeros((self.info.channels, *input_size(self.cfg.data, self.info)), np.float32)
        list(classify(self.network, [blank_CHW], 1))  # warm-up: the first call is slow
        with contextlib.ExitStack() as stack:
            screen = stack.enter_context(Live(console=CONSOLE, transient=True)) if CONSOLE.is_terminal else None
            for prediction in classify(self.network, frames, self.cfg.data.timesteps, self.margin):
                self.latencies.add(prediction.seconds)
                line = self._line(prediction)
                if screen and not prediction.final:
                    screen.update(line)
                else:
                    CONSOLE.print(line, highlight=False, markup=False, soft_wrap=True)
                self.decisions += prediction.final

    def _line(self, prediction: Prediction) -> str:
        sample, step, label, probability, margin, seconds, final = prediction
        return (
            f"sample {sample}, frame {step}/{self.cfg.data.timesteps}: {self.info.classes[label]} "
            f"{100 * probability:.1f} %, margin {margin:.3f}, latency {1e3 * seconds:.1f} ms"
            f"{' - decided' if final else ''}"
        )

    def summarise(self) -> None:
        """Print the numbers of frames and decisions, and the latencies of the frames."""
        if not self.latencies.frames:
            return
        median, high, largest = (1e3 * seconds for seconds in self.latencies.quantiles())
        print(
            f"{self.latencies.frames:,} frames, {self.decisions:,} decisions; latency of a frame: "
            f"median {median:.1f} ms, 99 % under {high:.1f} ms, at most {largest:.1f} ms"
        )
