"""Reader of events in HDF5 with the library h5py (the extra `cameras`), in the layouts that people share.

DSEC: events/x, y, t, p, with times since t_offset. Metavision: CD/events, an array of records. Older tools: events/xs,
ys, ts, ps, with times in seconds. The columns are found by their names in any group, and read in pieces.
"""

import contextlib
import importlib
import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from multifire.events.aedat4 import INSTALL
from multifire.events.columns import LATEST, Columns, choose_unit, find_columns
from multifire.events.recording import (
    MAX_RECORD,
    Packed,
    Packer,
    Recording,
    Stray,
    check_count,
    damage_reported,
)
from multifire.utils.hdf5_texts import Texts

if TYPE_CHECKING:
    pass

AT_A_TIME = 1 << 15  # events
GUESS_EVENTS = 4096
MAX_CHUNK = 16 << 20
"""Maximum bytes of a chunk of a data set, which is decompressed as a whole; h5py makes chunks of at most 1 MB."""
MAX_DEPTH, MAX_ENTRIES = 4, 2000  # groups below each other, and all entries, among which events are searched
MAX_PIXELS = 1 << 15
COMPRESSION = {32001: "Blosc", 32004: "LZ4", 32015: "Zstandard", 32026: "Blosc2", 36559: "Prophesee's ECF"}
SIZES = ("sensor_resolution", "sensor_size", "resolution")


def open_hdf5(source: Path | BinaryIO, name: str, given: tuple[int, int] | None, stray: Stray) -> Recording:
    """Open the events in an HDF5 file, a path or a file that can seek.

    Raises:
        ValueError: h5py is not installed, no events or those of several cameras, or a damaged file.
    """
    if importlib.util.find_spec("h5py") is None:
        raise ValueError(f"{name}: reading HDF5 needs the library h5py; {INSTALL}")
    if not (source.is_file() if isinstance(source, Path) else source.seekable()):
        raise ValueError(f"{name}: HDF5 is read from a file that can seek only; write it to one first")
    h5py = importlib.import_module("h5py")
    with damage_reported(name):
        file = h5py.File(source, "r", rdcc_nbytes=MAX_CHUNK, locking=False)
        try:
            return _open(file, source, name, given, stray)
        except BaseException:
            file.close()
            raise


def _bytes_of(source: Path | BinaryIO) -> int:
    return source.stat().st_size if isinstance(source, Path) else source.seek(0, 2)


def _open(file: Any, source: Path | BinaryIO, name: str, given: tuple[int, int] | None, stray: Stray) -> Recording:
    found = list(_event_tables(file, iter(range(MAX_ENTRIES))))
    if len(found) != 1:
        places = ": " + ", ".join(table[0] for table in found)[:200] if found else ""
        raise ValueError(f"{name}: holds the events of {len(found)} cameras{places}, expected those of one")
    place, columns, time_name = found[0]
    for key, column in columns.items():
        _check_column(column, f"{name}: its {key} in {place}")
    count = len(columns["t"][0])
    if any(len(dataset) != count for dataset, _ in columns.values()):
        raise ValueError(f"{name}: its columns in {place} differ in length; the file is damaged")
    check_count(name, count, _bytes_of(source))
    nodes = _with_parents(file, place)
    with source.open("rb") if isinstance(source, Path) else contextlib.nullcontext(source) as content:
        texts = Texts(content, name)
        size = next((size for node in nodes if (size := _size(node, texts))), None) or given
    packer = Packer(name, size, stray)
    unit = choose_unit(name, time_name, _piece(columns, "t", 0, min(count, GUESS_EVENTS)))
    offset = next((offset for offset in (_offset(node, name) for node in nodes) if offset), 0)
    packed = _read(name, columns, count, Columns(packer, unit, offset))
    return Recording(name, "hdf5", size, packed, file, packer=packer)


Column = tuple[Any, str | None]
"""A data set, and the field of its records that is the column."""


def _event_tables(
    group: Any, left: Iterator[int], path: str = "", depth: int = 0
) -> Iterator[tuple[str, dict[str, Column], str]]:
    """Yield path, columns and the name of t for each group of columns, and each array of records, that holds events.

    Every entry takes a number of `left`, so that groups that contain each other are not searched without end.
    """
    h5py = importlib.import_module("h5py")
    entries: dict[str, Any] = {}
    for _, key in zip(left, group, strict=False):
        if isinstance(group.get(key, getlink=True), h5py.HardLink):  # others may lead to other files
            entries[key] = group[key]
    arrays = {key: entry for key, entry in entries.items() if isinstance(entry, h5py.Dataset) and entry.ndim == 1}
    if names := find_columns(arrays):
        yield path or "/", {key: (arrays[name], None) for key, name in names.items()}, names["t"]
        return
    for key, array in arrays.items():
        if names := find_columns(array.dtype.names or ()):
            yield f"{path}/{key}", {column: (array, name) for column, name in names.items()}, names["t"]
    for key, entry in entries.items():
        if isinstance(entry, h5py.Group) and depth < MAX_DEPTH:
            yield from _event_tables(entry, left, f"{path}/{key}", depth + 1)


def _check_column(column: Column, what: str) -> None:
    dataset, field = column
    if dataset.is_virtual or dataset.external:
        raise ValueError(f"{what} lies in another file, which is not read; copy it into this one")
    dtype = dataset.dtype if field is None else dataset.dtype[field]
    if dtype.kind not in "biuf":
        raise ValueError(f"{what} is of type {dtype}, expected numbers")
    if dataset.dtype.hasobject or dataset.dtype.itemsize > MAX_RECORD:
        raise ValueError(f"{what} lies in records of {dataset.dtype}, expected at most {MAX_RECORD} bytes of numbers")
    if dataset.chunks and dataset.chunks[0] * dataset.dtype.itemsize > MAX_CHUNK:
        raise ValueError(
            f"{what} is compressed in chunks of {dataset.chunks[0]:,} events, expected at most "
            f"{MAX_CHUNK >> 20} MB a chunk; write it anew"
        )
    h5z = importlib.import_module("h5py").h5z
    settings = dataset.id.get_create_plist()
    for number in range(settings.get_nfilters()):
        code = settings.get_filter(number)[0]
        if not h5z.filter_avail(code) and importlib.util.find_spec("hdf5plugin"):
            importlib.import_module("hdf5plugin")
        if not h5z.filter_avail(code):
            method = COMPRESSION.get(code, f"the filter {code}")
            raise ValueError(
                f"{what} is compressed with {method}, which h5py does not read here; pip install hdf5plugin, or for "
                "ECF Prophesee's hdf5_ecf"
            )


def _with_parents(file: Any, place: str) -> list[Any]:
    parts = place.strip("/").split("/")
    return [file["/".join(parts[:count])] if count and parts[0] else file for count in range(len(parts), -1, -1)]


def _size(node: Any, texts: Texts) -> tuple[int, int] | None:
    """Return (H, W) from a node's attributes; cameras are wider than high, and writers disagree about the order."""
    numbers = {key: _attribute(node, key, texts) for key in ("width", "height", *SIZES, "geometry")}
    if numbers["width"] and numbers["height"]:
        height, width = numbers["height"][0], numbers["width"][0]
        return (height, width) if 0 < height <= MAX_PIXELS and 0 < width <= MAX_PIXELS else None
    found = next((numbers[key] for key in (*SIZES, "geometry") if numbers[key]), [])
    if len(found) != 2 or not all(0 < number <= MAX_PIXELS for number in found):
        return None
    return min(found), max(found)


def _attribute(node: Any, key: str, texts: Texts) -> list[int]:
    """Return the first three whole numbers of an attribute, or of its text; none if there is no such attribute."""
    if key not in node.attrs:
        return []
    dtype = node.attrs.get_id(key).dtype
    if dtype.hasobject:  # text of any length, which h5py must not read
        header = importlib.import_module("h5py").h5o.get_info(node.id).addr
        text = (texts.attribute(header, key) or b"").decode(errors="replace")
    elif dtype.kind == "S":
        text = str(node.attrs[key])
    else:
        return [int(number) for number in np.ravel(np.asarray(node.attrs[key]))[:3].tolist()]
    return [int(number) for number in re.findall(r"[0-9]+", text[:40])][:3]


def _offset(node: Any, name: str) -> int:
    """Return the µs from which DSEC counts its times."""
    h5py = importlib.import_module("h5py")
    if not isinstance(node, h5py.Group) or not isinstance(node.get("t_offset", getlink=True), h5py.HardLink):
        return 0
    value = node["t_offset"]
    if not isinstance(value, h5py.Dataset) or value.size != 1 or value.dtype.kind not in "iu":
        raise ValueError(f"{name}: its t_offset is {value}, expected one whole number of µs; the file is damaged")
    offset = int(np.ravel(value[()])[0])
    if not 0 <= offset < LATEST:
        raise ValueError(f"{name}: its t_offset is {offset:,} µs, expected 0 to 2^62; the file is damaged")
    return offset


def _read(name: str, columns: dict[str, Column], count: int, pack: Columns) -> Iterator[Packed]:
    with damage_reported(name):
        for first in range(0, count, AT_A_TIME):
            last = min(first + AT_A_TIME, count)
            if columns["t"][1] is not None:  # records, of which all columns come at once
                records = columns["t"][0][first:last]
                yield pack.pack(*(records[columns[key][1]] for key in "txyp"))
            else:
                yield pack.pack(*(_piece(columns, key, first, last) for key in "txyp"))


def _piece(columns: dict[str, Column], key: str, first: int, last: int) -> np.ndarray:
    dataset, field = columns[key]
    values = dataset[first:last]
    return values if field is None else values[field]
