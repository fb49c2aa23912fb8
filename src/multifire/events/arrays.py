"""Readers of NumPy's files of events: NPY with a structured array or four columns, NPZ with a member for each column.

They are read in pieces, so that memory does not grow with the recording, and never unpickled.
"""

import io
import zipfile
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

import numpy as np
from numpy.lib import format as npy

from multifire.events.columns import Columns, choose_unit, find_columns, guess_columns
from multifire.events.recording import (
    CHUNK_BYTES,
    MAX_RECORD,
    ByteStream,
    Closable,
    Packed,
    Packer,
    Recording,
    Stray,
    check_count,
    damage_reported,
)

NPY_MAGIC = b"\x93NUMPY"
ZIP_MAGIC = b"PK\x03\x04"
MAX_HEADER = 1 << 13  # NumPy writes 128 bytes, and does not read more than 10,000
GUESS_EVENTS = 4096
AT_A_TIME = 1 << 15  # events of an NPZ
MAX_PIXELS = 1 << 15


class Array(NamedTuple):
    """An array in a file: its stream of bytes, behind the header."""

    stream: ByteStream
    dtype: np.dtype
    length: int

    def first(self, count: int) -> np.ndarray:
        data = self.stream.peek(min(count, self.length) * self.dtype.itemsize)
        return np.frombuffer(data, self.dtype, len(data) // self.dtype.itemsize)

    def take(self, count: int) -> np.ndarray:
        """Return and consume the next elements; fewer at the end of the file."""
        data = self.stream.read(count * self.dtype.itemsize)
        return np.frombuffer(data, self.dtype, len(data) // self.dtype.itemsize)


def open_npy(
    stream: ByteStream, given: tuple[int, int] | None, stray: Stray, unit_us: int | None, own: Closable | None
) -> Recording:
    """Open an NPY file: a structured array, or one of [events, 4].

    Raises:
        ValueError: another array, objects, or a damaged file.
    """
    with damage_reported(stream.name):
        array = _array(stream)
        return _structured(stream.name, "npy", array, given, stray, unit_us, own)


def open_npz(
    file: BinaryIO, name: str, given: tuple[int, int] | None, stray: Stray, unit_us: int | None, own: Closable | None
) -> Recording:
    """Open an NPZ file: four arrays named like t, x, y and p, or a structured one.

    Raises:
        ValueError: other arrays, objects, a file that cannot seek, or a damaged one.
    """
    if not file.seekable():
        raise ValueError(f"{name}: npz is read from a file that can seek only; write it to one first")
    with damage_reported(name):
        archive = zipfile.ZipFile(file)
        members = [member.removesuffix(".npy") for member in archive.namelist() if member.endswith(".npy")]
        size = file.seek(0, io.SEEK_END)
        given = _sensor(archive, members, name) or given
        if found := find_columns(members):
            arrays = {key: _member(archive, found[key], name, size) for key in "txyp"}
            return _of_columns(name, found["t"], arrays, given, stray, unit_us, own)
        for member in members[:16]:
            array = _member(archive, member, name, size)
            if find_columns(array.dtype.names or ()):
                return _structured(name, "npz", array, given, stray, unit_us, own)
    raise ValueError(f"{name}: holds {_listed(members)}, expected arrays t, x, y and p, or a structured one")


def _sensor(archive: zipfile.ZipFile, members: list[str], name: str) -> tuple[int, int] | None:
    """Return (H, W) if the arrays `height` and `width` hold one whole number each."""
    sides = []
    for member in ("height", "width"):
        if member in members:
            with archive.open(f"{member}.npy") as file:
                content = file.read(MAX_HEADER)
            try:
                array = npy.read_array(io.BytesIO(content), allow_pickle=False)
            except MemoryError:
                raise ValueError(f"{name}: its {member} claims to be larger than the file; write it anew") from None
            if array.size != 1 or array.dtype.kind not in "iu" or not 0 < array.item() <= MAX_PIXELS:
                raise ValueError(f"{name}: its {member} is {array}, expected 1 to {MAX_PIXELS:,} pixels; write it anew")
            sides.append(array.item())
    return (sides[0], sides[1]) if len(sides) == 2 else None


def _listed(members: list[str]) -> str:
    return f"the arrays {', '.join(members)[:200]}" if members else "no array"


def _member(archive: zipfile.ZipFile, member: str, name: str, size: int) -> Array:
    array = _array(ByteStream(archive.open(f"{member}.npy"), name))  # pyright: ignore[reportArgumentType]
    check_count(name, array.length, size)
    return array


def _array(stream: ByteStream) -> Array:
    """Read the header of an NPY file.

    Raises:
        ValueError: an array of objects, of more dimensions, or with elements too large for an event.
    """
    start = stream.peek(12)
    version, length_bytes = tuple(start[6:8]), 2 if start[6:7] == b"\x01" else 4
    length = int.from_bytes(start[8 : 8 + length_bytes], "little")
    if not start.startswith(NPY_MAGIC) or version not in ((1, 0), (2, 0)) or length > MAX_HEADER:
        raise ValueError(f"{stream.name}: begins with {start!r}, expected the header of an array; the file is damaged")
    npy.read_magic(stream)  # pyright: ignore[reportArgumentType]
    read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
    shape, fortran, dtype = read(stream)  # pyright: ignore[reportArgumentType]
    if dtype.hasobject:
        raise ValueError(f"{stream.name}: holds Python objects, which are not read; save plain numbers")
    if len(shape) == 2 and fortran:
        raise ValueError(
            f"{stream.name}: holds an array {list(shape)} in columns, expected rows; save np.ascontiguousarray of it"
        )
    if len(shape) == 2 and shape[1] == 4 and not dtype.names:
        dtype = np.dtype([(str(column), dtype) for column in range(4)])
    elif len(shape) != 1:
        raise ValueError(
            f"{stream.name}: holds an array {list(shape)} of {dtype}, expected a "
            "structured one with t, x, y and p, or rows of four; save it so"
        )
    if not 0 < dtype.itemsize <= MAX_RECORD or shape[0] < 0:
        raise ValueError(f"{stream.name}: holds {shape[0]:,} elements of {dtype}, expected events")
    return Array(stream, dtype, shape[0])


def _structured(
    name: str,
    format: str,
    array: Array,
    given: tuple[int, int] | None,
    stray: Stray,
    unit_us: int | None,
    own: Closable | None,
) -> Recording:
    first = array.first(GUESS_EVENTS)
    names = array.dtype.names or ()
    fields = find_columns(names)
    if names == ("0", "1", "2", "3") and len(first):
        table = np.stack([first[field].astype(float) for field in names], 1)
        fields = dict(zip("txyp", map(str, guess_columns(table, name)), strict=True))
    if not fields:
        raise ValueError(f"{name}: holds {array.length:,} elements of {array.dtype}, expected fields t, x, y and p")
    for field in fields.values():
        if array.dtype[field].shape:
            raise ValueError(f"{name}: its field {field} is {array.dtype[field]}, expected a number for each event")
    packer = Packer(name, given, stray)
    columns = Columns(packer, unit_us or choose_unit(name, fields["t"], first[fields["t"]]))
    packed = _records(array, fields, columns)
    return Recording(name, format, given, packed, own, packer=packer)


def _records(array: Array, fields: dict[str, str], columns: Columns) -> Iterator[Packed]:
    left = array.length
    with damage_reported(array.stream.name):
        while left:
            at_once = min(left, CHUNK_BYTES // array.dtype.itemsize)
            events = array.take(at_once)
            yield columns.pack(*(events[fields[key]] for key in "txyp"))
            left -= len(events)
            if len(events) < at_once:
                array.stream.warn_cut(f"before the last {left:,} of its {array.length:,} events")
                return


def _of_columns(
    name: str,
    time: str,
    arrays: dict[str, Array],
    given: tuple[int, int] | None,
    stray: Stray,
    unit_us: int | None,
    own: Closable | None,
) -> Recording:
    lengths = {key: array.length for key, array in arrays.items()}
    if len(set(lengths.values())) > 1:
        found = ", ".join(f"{length:,} of {key}" for key, length in lengths.items())
        raise ValueError(f"{name}: holds {found}, expected equally many; the file is damaged")
    for key, array in arrays.items():
        if array.dtype.kind not in "biuf":
            raise ValueError(f"{name}: its {key} is of type {array.dtype}, expected a number for each event")
    packer = Packer(name, given, stray)
    columns = Columns(packer, unit_us or choose_unit(name, time, arrays["t"].first(GUESS_EVENTS)))
    return Recording(name, "npz", given, _rows(name, arrays, columns), own, packer=packer)


def _rows(name: str, arrays: dict[str, Array], columns: Columns) -> Iterator[Packed]:
    left = arrays["t"].length
    with damage_reported(name):
        while left:
            parts = [arrays[key].take(min(left, AT_A_TIME)) for key in "txyp"]
            if any(len(part) < min(left, AT_A_TIME) for part in parts):
                raise ValueError(f"{name}: an array ends {left:,} events early; the file is damaged")
            yield columns.pack(*parts)
            left -= len(parts[0])
