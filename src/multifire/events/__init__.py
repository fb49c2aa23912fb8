"""Read recordings of event cameras and convert them to frames: recording → events → frames."""

from pathlib import Path
from typing import BinaryIO

import numpy as np

from multifire.events import aedat, cameras, nmnist
from multifire.events.frames import FrameOptions, Frames, frames_of_windows, to_frames
from multifire.events.recording import EVENT_DTYPE, ByteStream, Chunk, Recording

__all__ = [
    "EVENT_DTYPE",
    "Chunk",
    "FrameOptions",
    "Frames",
    "Recording",
    "frames_of_windows",
    "open_recording",
    "read_events",
    "to_frames",
]

HEAD_BYTES = 4096
FORMATS = "AEDAT 2.0 (DVS128), AEDAT 3.1, N-MNIST's .bin, or with the extra `cameras` AEDAT4, EVT2, EVT3"


def open_recording(
    source: str | Path | BinaryIO, name: str = "", sensor_size: tuple[int, int] | None = None
) -> Recording:
    """Open a recording of any known format, detected by its content.

    Args:
        source: a path, or an open binary file, which the caller closes; it need not be seekable.
        name: name in messages; the ending .bin marks N-MNIST's format, which has no magic number.
        sensor_size: (H, W) for an AEDAT 3.1 recording whose header names no known camera.

    Raises:
        FileNotFoundError: no such file.
        ValueError: empty, or an unknown format.
    """
    if not isinstance(source, (str, Path)):
        return _open(source, name or str(getattr(source, "name", "recording")), sensor_size, None)
    file = Path(source).open("rb")  # noqa: SIM115 - the recording closes it
    try:
        return _open(file, name or str(source), sensor_size, file)
    except BaseException:
        file.close()
        raise


def _open(file: BinaryIO, name: str, sensor_size: tuple[int, int] | None, own: BinaryIO | None) -> Recording:
    stream = ByteStream(file, name)
    head = stream.peek(HEAD_BYTES)
    if not head:
        raise ValueError(f"{name}: is empty, expected a recording of events; fetch it again")
    if head.startswith(b"#!AER-DAT2.0"):
        for _ in aedat.read_header(stream):
            pass
        return Recording(name, "aedat2", aedat.DVS128, aedat.read_aedat2(stream), own)
    if head.startswith(b"#!AER-DAT3.1"):
        header_size = aedat.sensor_of(aedat.read_header(stream))
        size = sensor_size or header_size
        recording = Recording(name, "aedat3.1", size, iter(()), own)
        recording._packed = aedat.read_aedat31(stream, recording.raster)
        return recording
    if kind := cameras.kind_of(head):
        if not own:
            raise ValueError(f"{name}: {kind} is read from a file of its own only; unpack it first")
        own.close()
        return cameras.open_camera_file(Path(own.name), kind)
    if not head.startswith((b"#", b"%")) and (name.lower().endswith(".bin") or nmnist.looks_like_nmnist(head)):
        return Recording(name, "nmnist", nmnist.SENSOR, nmnist.read_nmnist(stream), own)
    raise ValueError(f"{name}: is of no known format: begins with {head[:16]!r}, expected {FORMATS}")


def read_events(path: str | Path | BinaryIO) -> np.ndarray:
    """Read all events of a recording of any known format.

    Returns:
        EVENT_DTYPE [N]: t in µs, x the column, y the row, p the polarity; non-decreasing in t.

    Raises:
        FileNotFoundError: no such file.
        ValueError: damaged, an unknown format, or no events.
    """
    with open_recording(path) as recording:
        events = np.concatenate([_structured(chunk) for chunk in recording.chunks()])
    return events[np.argsort(events["t"], kind="stable")] if recording.backwards else events


def _structured(chunk: Chunk) -> np.ndarray:
    events = np.empty(len(chunk.t), EVENT_DTYPE)
    events["t"], events["x"], events["y"], events["p"] = chunk
    return events
