"""Convert a recording to another format, in bounded memory, with the same events."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from multifire.events.hot_pixels import find_hot_pixels
from multifire.events.recording import Chunk, Recording
from multifire.events.writers import FORMATS, open_writer
from multifire.utils.files import explain_full_disk, write_beside
from multifire.utils.log import log

ENDINGS = {".npz": "npz", ".h5": "hdf5", ".hdf5": "hdf5", ".csv": "csv", ".txt": "csv"}


class Converted(NamedTuple):
    events: int
    sensor_size: tuple[int, int] | None
    """(H, W) in pixels; None if it is unknown."""
    read: str
    """Format of the source."""
    written: str


def convert(
    factory: Callable[[], Recording],
    out: Path,
    to: str | None = None,
    *,
    flip_x: bool = False,
    flip_y: bool = False,
    drop_hot_pixels: bool = False,
) -> Converted:
    """Write a recording to `out`, which appears when it is complete.

    Args:
        factory: opens the recording; called once more to find hot pixels.
        out: the new file; an existing one is replaced.
        to: one of FORMATS (default: as the file's ending says).
        flip_x, flip_y: turn the recording left to right, upside down; this needs the sensor's size.
        drop_hot_pixels: leave out the events of hot pixels, see `hot_pixels`.

    Raises:
        ValueError: a damaged recording, an unknown format, or one that cannot hold the events.
        FileNotFoundError: no such recording, or no such folder.
        OSError: the disk is full or fails.
    """
    to = format_of(out, to)
    hot_HW = None
    if drop_hot_pixels:
        with factory() as recording:
            recording.quiet = True
            hot_HW = find_hot_pixels(recording)
            log.info("%s: leaves out %s hot pixels", recording.name, f"{hot_HW.sum():,}")
    with (
        factory() as recording,
        explain_full_disk(out.parent, "make room, or write elsewhere"),
        write_beside(out) as new,
    ):
        if out.exists() and Path(recording.name).exists() and out.samefile(recording.name):
            raise ValueError(f"{out}: is the recording itself; give another file to write to")
        if (flip_x or flip_y) and recording.sensor_size is None:
            raise ValueError(f"{recording.name}: does not state its sensor's size, which turning it needs; give it")
        if hot_HW is not None:
            recording.drop_pixels(hot_HW)
        return Converted(_copy(recording, new, to, flip_x, flip_y), recording.sensor_size, recording.format, to)


def format_of(out: Path, to: str | None) -> str:
    """Return the format to write: as given, or as the file's ending says.

    Raises:
        ValueError: an unknown format, or an ending that says none.
    """
    if to in FORMATS:
        return to
    if to is not None:
        raise ValueError(f"the format is {to!r}, expected one of {', '.join(FORMATS)}")
    if out.suffix.lower() in ENDINGS:
        return ENDINGS[out.suffix.lower()]
    which = "AEDAT 2.0 or 3.1" if out.suffix.lower() == ".aedat" else "no format that is written"
    raise ValueError(f"{out}: ends in {out.suffix or 'nothing'!r}, {which}; give --to {', '.join(FORMATS)}")


def _copy(recording: Recording, path: Path, to: str, flip_x: bool, flip_y: bool) -> int:
    height, width = recording.raster
    writer = open_writer(path, to, recording.sensor_size)
    count = 0
    try:
        for t, x, y, p in recording.chunks():
            writer.write(Chunk(t, width - 1 - x if flip_x else x, height - 1 - y if flip_y else y, p))
            count += len(t)
    finally:
        writer.close()
    return count
