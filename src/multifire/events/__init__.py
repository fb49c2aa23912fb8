"""Read recordings of event cameras and convert them to frames: recording → events → frames."""

from pathlib import Path
from typing import BinaryIO, get_args

import numpy as np

from multifire.events import aedat, aedat4, arrays, dat, evt, hdf5, mat, nmnist
from multifire.events.aedat2 import open_aedat2
from multifire.events.frames import FrameOptions, Frames, frames_of_windows, to_frames
from multifire.events.recording import EVENT_DTYPE, ByteStream, Chunk, Packer, Recording, Stray
from multifire.events.text import looks_like_text, open_text
from multifire.utils import hdf5_texts

__all__ = [
    "EVENT_DTYPE",
    "Chunk",
    "FrameOptions",
    "Frames",
    "Recording",
    "Stray",
    "frames_of_windows",
    "open_recording",
    "read_events",
    "to_frames",
]

HEAD_BYTES = 4096
FORMATS = (
    "AEDAT 2.0, AEDAT 3.1, N-MNIST's .bin, DAT, EVT2, EVT3, NPY, NPZ, MAT, text or CSV, or with the extra `cameras` "
    "HDF5 or AEDAT4"
)


def open_recording(
    source: str | Path | BinaryIO,
    name: str = "",
    sensor_size: tuple[int, int] | None = None,
    stray: Stray = "refuse",
    unit_us: int | None = None,
) -> Recording:
    """Open a recording of any known format, detected by its content.

    Args:
        source: a path, or an open binary file, which the caller closes; it need not be seekable.
        name: name in messages; the ending .bin marks N-MNIST's format, which has no magic number.
        sensor_size: (H, W) of the sensor, for files that do not state it.
        stray: what happens to events beside the sensor: "refuse" raises an error with their number, "drop" leaves them
            out and logs their number.
        unit_us: µs of the unit of time in an NPY or NPZ file (default: from the column's name, else from its values).

    Raises:
        FileNotFoundError: no such file.
        ValueError: empty, or an unknown format.
    """
    if stray not in get_args(Stray):
        raise ValueError(f"stray is {stray!r}, expected one of {', '.join(get_args(Stray))}")
    if not isinstance(source, (str, Path)):
        return _open(source, name or str(getattr(source, "name", "recording")), sensor_size, stray, unit_us, None)
    file = Path(source).open("rb")  # noqa: SIM115 - the recording closes it
    try:
        return _open(file, name or str(source), sensor_size, stray, unit_us, file)
    except BaseException:
        file.close()
        raise


def _open(
    file: BinaryIO,
    name: str,
    sensor_size: tuple[int, int] | None,
    stray: Stray,
    unit_us: int | None,
    own: BinaryIO | None,
) -> Recording:
    stream = ByteStream(file, name)
    head = stream.peek(HEAD_BYTES)
    if not head:
        raise ValueError(f"{name}: is empty, expected a recording of events; fetch it again")
    if head.startswith(b"#!AER-DAT2.0"):
        return open_aedat2(stream, sensor_size, stray, own)
    if head.startswith(b"#!AER-DAT3.1"):
        size = aedat.sensor_of(aedat.read_header(stream)) or sensor_size
        packer = Packer(name, size, stray)
        return Recording(name, "aedat3.1", size, aedat.read_aedat31(stream, packer), own, packer=packer)
    if head.startswith(aedat4.MAGIC):
        if not own:
            raise ValueError(f"{name}: AEDAT4 is read from a file of its own only; unpack it first")
        own.close()
        return aedat4.open_aedat4(Path(own.name), stray)
    if evt.looks_like_evt(head):
        return evt.open_evt(stream, sensor_size, stray, own)
    if head.startswith(mat.MAGIC):
        return mat.open_mat(stream, sensor_size, stray, own)
    if head.startswith((hdf5_texts.MAGIC, mat.MAGIC_73)):
        if own:
            own.close()
        return hdf5.open_hdf5(Path(own.name) if own else file, name, sensor_size, stray)
    if head.startswith(arrays.NPY_MAGIC):
        return arrays.open_npy(stream, sensor_size, stray, unit_us, own)
    if head.startswith(arrays.ZIP_MAGIC):
        return arrays.open_npz(file, name, sensor_size, stray, unit_us, own)
    if dat.looks_like_dat(head):
        return dat.open_dat(stream, sensor_size, stray, own)
    if nmnist.looks_like_nmnist(head) or (name.lower().endswith(".bin") and not looks_like_text(head)):
        size = sensor_size or nmnist.SENSOR
        packer = Packer(name, size, stray)
        return Recording(name, "nmnist", size, nmnist.read_nmnist(stream, packer), own, packer=packer)
    if looks_like_text(head):
        return open_text(stream, sensor_size, stray, own)
    raise ValueError(f"{name}: is of no known format: begins with {head[:16]!r}, expected {FORMATS}")


def read_events(
    path: str | Path | BinaryIO, sensor_size: tuple[int, int] | None = None, stray: Stray = "refuse"
) -> np.ndarray:
    """Read all events of a recording of any known format.

    Args:
        sensor_size, stray: see `open_recording`.

    Returns:
        EVENT_DTYPE [N]: t in µs, x the column, y the row, p the polarity; non-decreasing in t.

    Raises:
        FileNotFoundError: no such file.
        ValueError: damaged, an unknown format, events beside the sensor, or no events.
    """
    with open_recording(path, sensor_size=sensor_size, stray=stray) as recording:
        events = np.concatenate([_structured(chunk) for chunk in recording.chunks()])
    return events[np.argsort(events["t"], kind="stable")] if recording.backwards else events


def _structured(chunk: Chunk) -> np.ndarray:
    events = np.empty(len(chunk.t), EVENT_DTYPE)
    events["t"], events["x"], events["y"], events["p"] = chunk
    return events
