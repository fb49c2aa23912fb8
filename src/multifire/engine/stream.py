"""A run's network on a stream: one frame after the other, a prediction with each.

T time steps, N samples, C channels, H height, W width, K classes.
"""

import contextlib
import time
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import torch
from rich.live import Live

from multifire.analysis.evaluate import check_margin, margins
from multifire.config import DataConfig
from multifire.datasets import DatasetInfo, get_info
from multifire.datasets.cache import frame_options
from multifire.events import Recording, frames_of_windows, open_recording
from multifire.events.live import LiveFrame, LiveFrames, Records, UdpRecords
from multifire.events.recording import Packed
from multifire.export import fold
from multifire.nn import SpikingResNet
from multifire.training.load_run import load_run
from multifire.utils.device import autocast, pick_device
from multifire.utils.log import log
from multifire.utils.progress import CONSOLE

KEPT_LATENCIES = 10_000


class Seen(NamedTuple):
    """What the network makes of the frames of a sample so far."""

    sample: int
    """Number of the sample; the first is 1."""
    step: int
    """Frames of it so far."""
    label: int
    probability: float
    """Softmax of the mean logits, of that class."""
    margin: float
    """Its probability less the next one's."""
    seconds: float
    """From the complete frame to this."""
    final: bool
    """Whether the sample has all its frames, or its margin passed the threshold: the next frame begins another."""


@torch.inference_mode()
def classify(
    model: SpikingResNet,
    frames: Iterable[np.ndarray],
    timesteps: int,
    margin: float | None = None,
    precision: str = "fp32",
) -> Iterator[Seen]:
    """Step through `frames` [C, H, W]; every `timesteps` frames are a sample, for which the membranes start at zero.

    With `margin`, a sample ends as soon as its own is above it.
    """
    device, dtype = model.voting.weight.device, model.voting.weight.dtype
    state, sample, step = None, 1, 0
    for frame in frames:
        seconds = -_now(device)
        x_NCHW = torch.from_numpy(frame)[None].to(device, dtype, memory_format=torch.channels_last)
        with autocast(device, precision):
            logits_NK, state = model.step(x_NCHW, state)
        label = int(logits_NK[0].argmax())
        sure = float(margins(logits_NK.float())[0])
        seconds += _now(device)
        step += 1
        final = step == timesteps or (margin is not None and sure > margin)
        yield Seen(sample, step, label, float(logits_NK.float().softmax(-1)[0, label]), sure, seconds, final)
        if final:
            state, sample, step = None, sample + 1, 0


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


class Latencies:
    """How long frames took; the quantiles are of the newest ones."""

    def __init__(self):
        self.frames = 0
        self._newest: deque[float] = deque(maxlen=KEPT_LATENCIES)

    def add(self, seconds: float) -> None:
        self.frames += 1
        self._newest.append(seconds)

    def quantiles(self) -> tuple[float, float, float]:
        """Median, 99th percentile and largest, in seconds."""
        median, high, largest = np.quantile(self._newest, (0.5, 0.99, 1.0)).tolist()
        return median, high, largest


def frames_of(path: Path, cfg: DataConfig, info: DatasetInfo) -> Iterator[np.ndarray]:
    """Frames [C, H, W] of a recording, an .npy array or a folder of such, as the network was trained to see them.

    A recording sliced by duration is cut as it is read, in memory that does not grow with it, into one sample after the
    other; the last is filled up with empty frames. Slicing by time or count needs its end before its first frame can be
    cut: the whole recording is one sample.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not of a known format, damaged, or not what the network takes.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder")
    if path.is_dir() or path.suffix == ".npy":
        return _frames_of_arrays(path, cfg, info)
    if not info.events:
        raise ValueError(
            f"{path}: this run was trained on images ({cfg.name}), expected an .npy file or a folder of them"
        )
    if cfg.slicing == "duration":
        return (frame.counts for frame in _frames_of_recording(path, cfg, info))
    frames = frames_of_windows(lambda: _open(path, info), [(None, None)], frame_options(cfg))[0]
    return iter(frames.counts)


def _open(path: Path, info: DatasetInfo) -> Recording:
    """The recording; where its file does not say its sensor's size, it is taken for one of the run's data set."""
    recording = open_recording(path)
    if recording.sensor_size is not None:
        return recording
    recording.close()
    return open_recording(path, sensor_size=(info.size, info.size))


def _frames_of_recording(path: Path, cfg: DataConfig, info: DatasetInfo) -> Iterator[LiveFrame]:
    with _open(path, info) as recording:
        assert recording.sensor_size
        live = LiveFrames(recording.sensor_size, frame_options(cfg), str(path))
        yield from follow(live, recording.packed())


def open_stream(port: int | None, file: BinaryIO, info: DatasetInfo) -> UdpRecords | Records:
    """Events of a camera of the size of the run's data set, from a UDP port of this machine, or from an open file.

    Raises:
        ValueError: this network does not see events, or such a port cannot be.
        OSError: the port is taken.
    """
    if not info.events:
        raise ValueError("this run was trained on images, which are not followed; give it .npy or a folder of them")
    size = (info.size, info.size)
    return Records(file, size, "standard input") if port is None else UdpRecords(port, size)


def follow(live: LiveFrames, chunks: Iterable[Packed]) -> Iterator[LiveFrame]:
    """The frames of events as they come, and at their end what is left; says how many events came too late."""
    for chunk in chunks:
        yield from live.push(chunk)
    yield from live.finish()
    if live.late:
        log.warning("%s events came after the frame that they belong to, and were left out", f"{live.late:,}")


def _frames_of_arrays(path: Path, cfg: DataConfig, info: DatasetInfo) -> Iterator[np.ndarray]:
    if not path.is_dir():
        array = _read_array(path, cfg, info)
        shown = cfg.timesteps if array.ndim == 3 and not info.events else 1  # a still image, as in training
        for _ in range(shown):
            yield from _normalised(array, info, path)
        return
    files = sorted(path.glob("*.npy"))
    if not files:
        raise ValueError(f"{path}: holds no .npy file, expected one for each frame, in the order of their names")
    for file in files:
        yield from _normalised(_read_array(file, cfg, info), info, file)


def _read_array(file: Path, cfg: DataConfig, info: DatasetInfo) -> np.ndarray:
    """[T, C, H, W] or [C, H, W], mapped into memory."""
    try:
        array = np.load(file, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise ValueError(f"{file}: no .npy array of numbers ({' '.join(str(error).split())})") from None
    size = cfg.frame_size if info.events else info.size
    shape = (info.channels, size, size)
    if array.dtype.kind not in "uif" or array.ndim not in (3, 4) or array.shape[-3:] != shape:
        raise ValueError(
            f"{file}: {array.dtype} {list(array.shape)}, expected numbers [T, C, H, W] with C, H, W = "
            f"{list(shape)}, or one frame [C, H, W]"
        )
    return array


def _normalised(array: np.ndarray, info: DatasetInfo, file: Path) -> Iterator[np.ndarray]:
    """Frames [C, H, W] in fp32: pixels 0..255 of images normalised as in training, counts and fractions as they are."""
    std_C11 = np.array(info.std, np.float32)[:, None, None]
    mean_C11 = np.array(info.mean, np.float32)[:, None, None]
    for frame_CHW in array.reshape(-1, *array.shape[-3:]):
        x_CHW = frame_CHW.astype(np.float32)
        if not np.isfinite(x_CHW).all():
            raise ValueError(f"{file}: holds NaN or an infinite number, expected finite ones")
        if not info.events and frame_CHW.dtype.kind != "f":
            x_CHW = x_CHW * (1 / (255 * std_C11)) - mean_C11 / std_C11
        yield x_CHW


class Player:
    """Shows a stream's predictions as they form: a line for each frame, on a terminal one that changes in place."""

    def __init__(self, folder: Path, which: str | None, device: str, margin: float | None):
        """Load a run's network.

        Raises:
            FileNotFoundError, ValueError: no such run, checkpoint or device, or a margin that is none.
        """
        if margin is not None:
            check_margin(margin)
        target = pick_device(device)
        run = load_run(folder, which)
        self.cfg = run.cfg
        self.model = fold(run.model).to(target)  # the same network, without the norms' share of every frame's latency
        self.info, self.margin = get_info(self.cfg.data.name), margin
        self.latencies = Latencies()
        self.verdicts = 0

    def play(self, source: Path) -> None:
        """Show what the network makes of a recording."""
        self._show(frames_of(source, self.cfg.data, self.info))

    def follow(self, file: BinaryIO, port: int | None) -> None:
        """Show what the network makes of the events that come from an open file, or to a UDP port, until they end."""
        with open_stream(port, file, self.info) as records:
            size = (self.info.size, self.info.size)
            live = LiveFrames(size, frame_options(self.cfg.data), "a stream")
            CONSOLE.print(f"following {records.name}; Ctrl-C ends", highlight=False, markup=False)
            self._show(frame.counts for frame in follow(live, records))

    def _show(self, frames: Iterator[np.ndarray]) -> None:
        size = self.cfg.data.frame_size if self.info.events else self.info.size
        warm = np.zeros((self.info.channels, size, size), np.float32)
        list(classify(self.model, [warm], 1, None, self.cfg.precision))  # the first call is slower than any other
        with contextlib.ExitStack() as stack:
            screen = stack.enter_context(Live(console=CONSOLE, transient=True)) if CONSOLE.is_terminal else None
            for seen in classify(self.model, frames, self.cfg.data.timesteps, self.margin, self.cfg.precision):
                self.latencies.add(seen.seconds)
                line = self._line(seen)
                if screen and not seen.final:
                    screen.update(line)
                else:
                    CONSOLE.print(line, highlight=False, markup=False, soft_wrap=True)
                self.verdicts += seen.final

    def _line(self, seen: Seen) -> str:
        return (
            f"sample {seen.sample}, frame {seen.step}/{self.cfg.data.timesteps}: {self.info.classes[seen.label]} "
            f"{100 * seen.probability:.1f} %, margin {seen.margin:.3f}, latency {1e3 * seen.seconds:.1f} ms"
            f"{' - decided' if seen.final else ''}"
        )

    def summarise(self) -> None:
        """Say how many frames there were, and how long they took."""
        if not self.latencies.frames:
            return
        median, high, largest = (1e3 * seconds for seconds in self.latencies.quantiles())
        print(
            f"{self.latencies.frames:,} frames, {self.verdicts:,} decisions; latency of a frame: "
            f"median {median:.1f} ms, 99 % under {high:.1f} ms, at most {largest:.1f} ms"
        )
