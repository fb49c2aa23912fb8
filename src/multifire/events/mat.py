"""Reader of MATLAB's level 5 files with events: arrays named like ts, x, y and pol, as ASL-DVS has them.

They are read whole: such a file holds one short recording. Files of version 7.3 are HDF5.

Source: MathWorks, "MAT-File Format", chapter 1.
"""

import zlib
from collections.abc import Iterator

import numpy as np

from multifire.events.columns import Columns, choose_unit, find_columns
from multifire.events.recording import ByteStream, Closable, Packed, Packer, Recording, Stray

MAGIC, MAGIC_73 = b"MATLAB 5.0 MAT-file", b"MATLAB 7.3 MAT-file"
HEADER_BYTES = 128
MAX_FILE = 64 << 20
MAX_INFLATED = 8  # times the file; arrays of events compress to a third
SMALL_FILE = 1 << 20  # smaller files count as this many bytes
MAX_ELEMENTS = 256
AT_A_TIME = 1 << 15  # events
NUMBERS = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8", 12: "i8", 13: "u8"}
"""NumPy's name of each type of numbers."""
MATRIX, COMPRESSED = 14, 15
NUMERIC_CLASSES = range(6, 16)


def open_mat(stream: ByteStream, given: tuple[int, int] | None, stray: Stray, own: Closable | None) -> Recording:
    """Open the events of a MATLAB file.

    Raises:
        ValueError: no such arrays, or a damaged file.
    """
    data = stream.read(MAX_FILE + 1)
    if len(data) > MAX_FILE:
        raise ValueError(f"{stream.name}: has more than {MAX_FILE >> 20} MB, too many for one recording; split it")
    arrays = dict(_arrays(stream.name, data))
    found = find_columns(arrays)
    if not found:
        listed = ", ".join(arrays)[:200] or "no array of numbers"
        raise ValueError(f"{stream.name}: holds {listed}, expected arrays ts, x, y and pol")
    columns = {key: arrays[found[key]] for key in "txyp"}
    if len({len(column) for column in columns.values()}) > 1:
        raise ValueError(f"{stream.name}: its arrays {', '.join(found.values())} differ in length; it is damaged")
    packer = Packer(stream.name, given, stray)
    unit = choose_unit(stream.name, found["t"], columns["t"])
    packed = _packed(columns, Columns(packer, unit))
    return Recording(stream.name, "mat", given, packed, own, packer=packer)


def _packed(columns: dict[str, np.ndarray], pack: Columns) -> Iterator[Packed]:
    for first in range(0, len(columns["t"]), AT_A_TIME):
        yield pack.pack(*(columns[key][first : first + AT_A_TIME] for key in "txyp"))


def _arrays(name: str, data: bytes) -> Iterator[tuple[str, np.ndarray]]:
    """Yield name and flattened values of each array of numbers."""
    order = {b"IM": "<", b"MI": ">"}.get(data[126:128])
    if order is None:
        raise _damaged(name, f"its byte order is {data[126:128]!r}")
    left = MAX_INFLATED * max(len(data), SMALL_FILE)
    for kind, content in _elements(name, data[HEADER_BYTES:], order):
        if kind == COMPRESSED:
            try:
                inflater = zlib.decompressobj()
                inflated = inflater.decompress(content, left)
            except zlib.error as error:
                raise _damaged(name, str(error)) from None
            if inflater.unconsumed_tail:
                raise _damaged(name, f"an array inflates to more than {left:,} bytes")
            left -= len(inflated)
            kind, content = next(_elements(name, inflated, order), (0, b""))
        if kind == MATRIX and (array := _array(name, content, order)):
            yield array
        if left <= 0:
            raise _damaged(name, "its arrays inflate to too many bytes")


def _elements(name: str, data: bytes, order: str) -> Iterator[tuple[int, bytes]]:
    """Yield type and content of each element; a small one has its size and content within eight bytes."""
    at = 0
    for _ in range(MAX_ELEMENTS):
        if at + 8 > len(data):
            return
        kind, size = (int(value) for value in np.frombuffer(data, f"{order}u4", 2, at))
        if kind >> 16:
            kind, size, start, step = kind & 0xFFFF, kind >> 16, at + 4, 8
        else:
            start, step = at + 8, 8 + (size if kind == COMPRESSED else -(-size // 8) * 8)
        if start + size > len(data) or (step == 8 and size > 4 and start == at + 4):
            raise _damaged(name, f"an element of {size:,} bytes has {max(len(data) - start, 0):,}")
        yield kind, data[start : start + size]
        at += step
    raise _damaged(name, f"has more than {MAX_ELEMENTS} elements")


def _array(name: str, content: bytes, order: str) -> tuple[str, np.ndarray] | None:
    """Return name and values of an array; None if it holds no real numbers."""
    parts = [part for _, part in zip(range(4), _elements(name, content, order), strict=False)]
    if len(parts) < 4 or len(parts[0][1]) < 4 or len(parts[2][1]) > 64:
        return None
    flags = int(np.frombuffer(parts[0][1], f"{order}u4", 1)[0])
    kind, values = parts[3]
    if flags & 0xFF not in NUMERIC_CLASSES or kind not in NUMBERS:
        return None
    numbers = np.dtype(order + NUMBERS[kind])
    return parts[2][1].decode("latin1"), np.frombuffer(values, numbers, len(values) // numbers.itemsize)


def _damaged(name: str, what: str) -> ValueError:
    return ValueError(f"{name}: cannot be read as a MATLAB file: {what}; it is damaged")
