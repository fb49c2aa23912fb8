"""Write events as AEDAT 2.0, AEDAT 3.1, NPZ, HDF5 or CSV, chunk by chunk; `read_events` returns the same events."""

import importlib
import importlib.util
import tempfile
import zipfile
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np
from numpy.lib import format as npy

from multifire.events.aedat import DVS128, EVENT_BYTES, MAX_OVERFLOW, PACKET, POLARITY, SENSOR_COMMENT
from multifire.events.aedat2 import START_COMMENT, WRAP, X_BITS, Y_BITS, Clock
from multifire.events.aedat4 import INSTALL
from multifire.events.recording import Chunk

PACKET_EVENTS = 4096
COPY_BYTES = 1 << 20
HDF5_CHUNK = 1 << 15  # events
COLUMNS = {"t": "<i8", "x": "<u2", "y": "<u2", "p": "|u1"}
CHIPS = {
    DVS128: "ch.unizh.ini.jaer.chip.retina.DVS128",
    (192, 208): "eu.seebetter.ini.chips.davis.Davis208",
    (180, 240): "eu.seebetter.ini.chips.davis.DAVIS240C",
    (260, 346): "eu.seebetter.ini.chips.davis.Davis346blue",
    (480, 640): "eu.seebetter.ini.chips.davis.Davis640",
}
"""jAER's name of the chip with this (H, W)."""


class Writer(Protocol):
    """Writes one recording."""

    def write(self, chunk: Chunk) -> None: ...

    def close(self) -> None:
        """Complete the file."""
        ...


def open_writer(path: Path, format: str, size: tuple[int, int] | None) -> Writer:
    """Return a writer of one of FORMATS to the new file `path`; `size` is the sensor's (H, W), if it is known.

    Raises:
        ValueError: the format cannot hold such a sensor, or h5py is not installed.
    """
    return FORMATS[format](path, size)


class Aedat2Writer:
    """Writes AEDAT 2.0, in the layout of the DVS128 for 128 × 128 pixels, else in that of the DAVIS; see `aedat2`."""

    def __init__(self, path: Path, size: tuple[int, int] | None):
        if size is None:
            raise ValueError("AEDAT 2.0 needs the sensor's size, which the recording does not state; give it")
        if size[0] > 1 << Y_BITS or size[1] > 1 << X_BITS:
            raise ValueError(
                f"AEDAT 2.0 holds sensors of up to {1 << X_BITS}×{1 << Y_BITS} pixels, this one has "
                f"{size[1]}×{size[0]}; write AEDAT 3.1"
            )
        self._size, self._clock = size, None
        self._file = path.open("wb")

    def _begin(self, first_us: int) -> Clock:
        """Write the header for times from about `first_us` on."""
        start = max((first_us >> 31) - 1, 0) << 31 if first_us >= WRAP else 0
        size = self._size
        lines = [
            "#!AER-DAT2.0",
            "# Data format is int32 address, int32 timestamp (8 bytes total), repeated for each event",
            "# Timestamps tick is 1 us",
            *([f"# AEChip: {CHIPS[size]}"] if size in CHIPS else []),
            f"{SENSOR_COMMENT.decode()}{size[1]}x{size[0]}",
            *([f"{START_COMMENT.decode()}{start}"] if start else []),
        ]
        self._file.write("".join(f"{line}\r\n" for line in lines).encode())
        return Clock(start)

    def write(self, chunk: Chunk) -> None:
        """Write events.

        Raises:
            ValueError: times that the reader would not find again from their lower 32 bits.
        """
        t, x, y, p = (column.astype(np.int64) for column in chunk)
        self._clock = self._clock or self._begin(int(t[0]))
        low = (t - self._clock.start) % WRAP
        if not np.array_equal(self._clock.unwrap(low), t):
            raise ValueError(
                f"AEDAT 2.0 holds the lower 32 bits of a time in µs, and more than 35 minutes lie between two events "
                f"up to {t[-1]:,} µs; write AEDAT 3.1"
            )
        address = y << 8 | (127 - x) << 1 | p if self._size == DVS128 else y << 22 | x << 12 | p << 11
        self._file.write(np.stack([address, low], 1).astype(">u4").tobytes())

    def close(self) -> None:
        self._file.close()


class Aedat31Writer:
    """Writes AEDAT 3.1: packets of polarity events of one camera; see `aedat`."""

    def __init__(self, path: Path, size: tuple[int, int] | None):
        self._file = path.open("wb")
        name = CHIPS[size].rpartition(".")[2] if size in CHIPS else "unknown"
        comment = f"{SENSOR_COMMENT.decode()}{size[1]}x{size[0]}\r\n" if size else ""
        self._file.write(f"#!AER-DAT3.1\r\n#Format: RAW\r\n#Source 1: {name}\r\n{comment}#!END-HEADER\r\n".encode())

    def write(self, chunk: Chunk) -> None:
        """Write events.

        Raises:
            ValueError: a time beyond that of the format.
        """
        t, x, y, p = (column.astype(np.int64) for column in chunk)
        if len(t) and int(t[-1]) >> 31 > MAX_OVERFLOW:
            raise ValueError(f"AEDAT 3.1 holds times of up to {MAX_OVERFLOW << 31:,} µs, found {t[-1]:,}")
        data = np.stack([x << 17 | y << 2 | p << 1 | 1, t & 0x7FFFFFFF], 1).astype("<u4")
        overflow = t >> 31
        turns = np.flatnonzero(np.diff(overflow)) + 1  # a packet has one overflow for all its events
        starts = np.union1d(np.arange(0, len(t), PACKET_EVENTS), turns)
        for start, end in zip(starts, [*starts[1:], len(t)], strict=True):
            count = int(end - start)
            head = (POLARITY, 1, EVENT_BYTES, EVENT_BYTES // 2, int(overflow[start]), count, count, count)
            self._file.write(PACKET.pack(*head) + data[start:end].tobytes())

    def close(self) -> None:
        self._file.close()


class NpzWriter:
    """Writes NPZ: arrays t (µs, int64), x, y, p, and if the sensor's size is known height and width.

    The number of events stands before the first one in such a file, so events are kept in temporary files beside it.
    """

    def __init__(self, path: Path, size: tuple[int, int] | None):
        self._path, self._size, self._count = path, size, 0
        self._columns = {name: tempfile.TemporaryFile(dir=path.parent) for name in COLUMNS}  # noqa: SIM115 - see close

    def write(self, chunk: Chunk) -> None:
        for (name, kind), column in zip(COLUMNS.items(), chunk, strict=True):
            self._columns[name].write(column.astype(kind).tobytes())
        self._count += len(chunk.t)

    def close(self) -> None:
        with zipfile.ZipFile(self._path, "w") as archive:
            for name, kind in COLUMNS.items():
                self._add(archive, name, kind)
            for name, pixels in zip(("height", "width"), self._size or (), strict=False):
                with archive.open(f"{name}.npy", "w") as member:
                    npy.write_array(member, np.array(pixels))

    def _add(self, archive: zipfile.ZipFile, name: str, kind: str) -> None:
        with archive.open(f"{name}.npy", "w", force_zip64=True) as member, self._columns[name] as column:
            npy.write_array_header_1_0(member, {"descr": kind, "fortran_order": False, "shape": (self._count,)})
            column.seek(0)
            while data := column.read(COPY_BYTES):
                member.write(data)


class Hdf5Writer:
    """Writes HDF5: events/t (µs, int64), x, y, p, and the attributes width and height of the group."""

    def __init__(self, path: Path, size: tuple[int, int] | None):
        if importlib.util.find_spec("h5py") is None:
            raise ValueError(f"writing HDF5 needs the library h5py; {INSTALL}")
        self._file: Any = importlib.import_module("h5py").File(path, "w")
        group = self._file.create_group("events")
        for name, pixels in zip(("height", "width"), size or (), strict=False):
            group.attrs[name] = pixels
        self._columns = {
            name: group.create_dataset(name, (0,), kind, maxshape=(None,), chunks=(HDF5_CHUNK,))
            for name, kind in COLUMNS.items()
        }

    def write(self, chunk: Chunk) -> None:
        for dataset, column in zip(self._columns.values(), chunk, strict=True):
            before = len(dataset)
            dataset.resize((before + len(column),))
            dataset[before:] = column

    def close(self) -> None:
        self._file.close()


class CsvWriter:
    """Writes CSV: a line `t,x,y,p`, then one for each event, with t in µs. It does not state the sensor's size."""

    def __init__(self, path: Path, size: tuple[int, int] | None):
        self._file: IO[str] = path.open("w", encoding="ascii", newline="\n")
        self._file.write("t,x,y,p\n")

    def write(self, chunk: Chunk) -> None:
        t, x, y, p = (column.tolist() for column in chunk)
        self._file.write("".join([f"{row[0]},{row[1]},{row[2]},{row[3]:d}\n" for row in zip(t, x, y, p, strict=True)]))

    def close(self) -> None:
        self._file.close()


FORMATS: dict[str, Any] = {
    "aedat2": Aedat2Writer,
    "aedat3.1": Aedat31Writer,
    "npz": NpzWriter,
    "hdf5": Hdf5Writer,
    "csv": CsvWriter,
}
