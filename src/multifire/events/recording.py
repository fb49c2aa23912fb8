"""An open recording, and the stream of bytes that it is read from."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO, Literal, NamedTuple, Protocol, Self

import numpy as np

from multifire.utils.log import log

EVENT_DTYPE = np.dtype([("t", "<i8"), ("x", "<i2"), ("y", "<i2"), ("p", "i1")])
"""An event: time in µs, column, row, polarity (1: brighter, 0: darker)."""

CHUNK_BYTES = 1 << 18
"""Bytes read at a time; the events made of them fit into a core's caches."""
MAX_HEADER = 16 << 20  # jAER writes 5 KB
EVENTS_PER_BYTE = 16
"""Maximum events for a byte of a compressed file of arrays; real ones take a byte or more for each."""
SMALL_FILE = 1 << 15  # smaller files count as this many bytes
MAX_RECORD = 1 << 12  # bytes of an event; a time and three numbers need 32
ANY_SENSOR = (1 << 15, 1 << 15)  # EVENT_DTYPE and AEDAT 3.1 have 15 bits for a coordinate

MAX_SIDE = 4096
"""Maximum side of a sensor whose pixels are counted: frames need a table of all."""

Stray = Literal["refuse", "drop"]
"""What happens to events beside the sensor: an error with their number, or they are left out and counted."""


def check_side(name: str, sensor_size: tuple[int, int]) -> None:
    """Refuse a sensor (H, W) so large that a table of its pixels would fill the memory.

    Raises:
        ValueError: a side is 0 or above MAX_SIDE.
    """
    height, width = sensor_size
    if not (0 < width <= MAX_SIDE and 0 < height <= MAX_SIDE):
        raise ValueError(
            f"{name}: says that its sensor has {width} × {height} pixels, expected 1 to {MAX_SIDE} a side; "
            "the file is damaged"
        )


class Chunk(NamedTuple):
    """Consecutive events, as columns."""

    t: np.ndarray
    """Time in µs, int64, non-decreasing within the chunk."""
    x: np.ndarray
    """Column."""
    y: np.ndarray
    """Row."""
    p: np.ndarray
    """Polarity, 0 or 1."""


class Packed(NamedTuple):
    """Consecutive events in the form from which frames are counted."""

    t: np.ndarray
    """Time in µs, int64."""
    pixel: np.ndarray
    """(y·W + x)·2 + p for a sensor of width W, int64."""


class ByteStream:
    """A binary stream with peek; it need not be seekable, so that archives are read in place."""

    def __init__(self, file: BinaryIO, name: str):
        self._file, self.name = file, name
        self._ahead, self._start = b"", 0  # bytes read ahead, and the offset of the first one not consumed
        self.position = 0
        """Offset of the next byte that `read` returns."""

    def peek(self, count: int) -> bytes:
        """Return the next `count` bytes without consuming them; fewer at the end of the file."""
        if len(self._ahead) - self._start < count:
            rest = self._ahead[self._start :]
            self._ahead, self._start = rest + self._fetch(count - len(rest)), 0
        return self._ahead[self._start : self._start + count]

    def read(self, count: int) -> bytes:
        """Return and consume the next `count` bytes; fewer at the end of the file."""
        data = self._ahead[self._start : self._start + count]
        self._start += len(data)
        if len(data) < count:
            self._ahead, self._start = b"", 0
            data += self._fetch(count - len(data))
        self.position += len(data)
        return data

    def read_header_line(self) -> bytes:
        """Return and consume the next line if it begins with `#`, else nothing."""
        if self.peek(1) != b"#":
            return b""
        length = 256
        while b"\n" not in (ahead := self.peek(length)) and len(ahead) == length:
            length *= 4
            self._check_header(length)
        line = self.read(ahead.find(b"\n") + 1 or len(ahead))
        self._check_header(self.position)
        return line

    def skip(self, count: int) -> int:
        """Skip `count` bytes; return the number of bytes that existed."""
        start = self.position
        while self.position - start < count and self.read(min(count - self.position + start, CHUNK_BYTES)):
            pass
        return self.position - start

    def records(self, size: int, at_a_time: int | None = None) -> Iterator[tuple[int, bytes]]:
        """Yield the number of the first record, and complete records of `size` bytes; log a truncated last one."""
        first = 0
        most = min(at_a_time or CHUNK_BYTES, CHUNK_BYTES)
        while data := self.read(most - most % size):
            if rest := len(data) % size:
                self.warn_cut(f"in the middle of an event: its last {rest} bytes are not read")
                data = data[: len(data) - rest]
            yield first, data
            first += len(data) // size

    def warn_cut(self, where: str) -> None:
        log.warning("%s: cut short %s; all whole events before it are kept", self.name, where)

    def rest(self) -> Iterator[bytes]:
        """Yield the bytes that follow without consuming them; nothing if the file cannot seek."""
        file = self._file
        try:
            at = file.tell()
            file.seek(at - (len(self._ahead) - self._start))
        except (OSError, AttributeError):
            return
        try:
            while data := self._fetch(CHUNK_BYTES):
                yield data
        finally:
            file.seek(at)

    def _check_header(self, length: int) -> None:
        if length > MAX_HEADER:
            raise ValueError(f"{self.name}: its header is longer than {MAX_HEADER:,} bytes; not a recording")

    def _fetch(self, count: int) -> bytes:
        data = self._file.read(count)
        while 0 < len(data) < count and (more := self._file.read(count - len(data))):
            data += more
        return data


@contextmanager
def damage_reported(name: str) -> Iterator[None]:
    """Turn any error of a library that reads the file `name` into a ValueError that says so."""
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:
        ours = isinstance(error, (ValueError, OSError)) and str(error).startswith(name)
        if ours or (isinstance(error, OSError) and error.errno):
            raise
        what = str(error).partition("\n")[0] or type(error).__name__
        raise ValueError(f"{name}: cannot be read: {what}; the file is damaged or cut short") from None


def check_count(name: str, events: int, file_bytes: int) -> None:
    """Raise ValueError if a compressed file claims more events than any recording of its size has."""
    most = EVENTS_PER_BYTE * max(file_bytes, SMALL_FILE)
    if not 0 <= events <= most:
        raise ValueError(
            f"{name}: says that it holds {events:,} events in {file_bytes:,} bytes, expected at most {most:,}; "
            "the file is damaged"
        )


class Closable(Protocol):
    def close(self) -> None: ...


class Recording:
    """An open recording, to be read once, from beginning to end.

    `name` stands in every message. Use it in a `with` statement, or call `close`.
    """

    def __init__(
        self,
        name: str,
        format: str,
        sensor_size: tuple[int, int] | None,
        packed: Iterator[Packed],
        file: Closable | None = None,
        allow_empty: bool = False,
        packer: "Packer | None" = None,
    ):
        self.name = name
        self.format = format
        self.sensor_size = sensor_size
        """(H, W) in pixels; None if the file does not state it."""
        self.backwards = 0
        """Number of times that time ran backwards so far, in the file's order."""
        self.quiet = False
        """True for a pass before the one that is used, so that nothing is logged twice."""
        self._packed, self._file, self._allow_empty, self._packer = packed, file, allow_empty, packer
        self._dropped: np.ndarray | None = None
        self._last = -(1 << 63)

    @property
    def raster(self) -> tuple[int, int]:
        """(H, W) used by `Packed.pixel`."""
        return self.sensor_size or ANY_SENSOR

    def drop_pixels(self, dropped_HW: np.ndarray) -> None:
        """Leave out the events of the pixels where the array [H, W] of the raster is True."""
        self._dropped = dropped_HW.ravel() if dropped_HW.any() else None

    def packed(self) -> Iterator[Packed]:
        """Yield the events in the file's order, sorted by time (stably) within each chunk.

        Raises:
            ValueError: a damaged file, an event outside the sensor, or no events.
        """
        count = 0
        for chunk in self._packed:
            if self._packer:
                self._packer.check(self._packed)
            if self._dropped is not None:
                kept = ~self._dropped[chunk.pixel >> 1]
                chunk = Packed(chunk.t[kept], chunk.pixel[kept])
            if len(chunk.t):
                count += len(chunk.t)
                yield self._in_order(chunk)
        if self._packer and self._packer.stray_count and not self.quiet:
            log.warning("%s: %s were dropped", self.name, self._packer.strays())
        if not count and not self._allow_empty:
            raise ValueError(f"{self.name}: holds no event; record it anew or leave it out")
        if self.backwards and not self.quiet:
            log.warning("%s: time runs backwards %s times; its events were sorted", self.name, f"{self.backwards:,}")

    def chunks(self) -> Iterator[Chunk]:
        """Yield the events like `packed`, with a column for each coordinate."""
        width = self.raster[1]
        for t, pixel in self.packed():
            position = (pixel >> 1).astype(np.int32)  # dividing int32 is twice as fast
            y = position // np.int32(width)
            yield Chunk(t, position - y * np.int32(width), y, pixel & 1)

    def _in_order(self, chunk: Packed) -> Packed:
        t, pixel = chunk
        steps_back = int(np.count_nonzero(t[1:] < t[:-1]))
        self.backwards += steps_back + bool(t[0] < self._last)
        self._last = int(t[-1])
        if not steps_back:
            return chunk
        order = np.argsort(t, kind="stable")
        return Packed(t[order], pixel[order])

    def close(self) -> None:
        if self._file:
            self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Packer:
    """Packs events of a sensor of (H, W), and leaves out and counts those beside it."""

    def __init__(self, name: str, size: tuple[int, int] | None, stray: Stray = "refuse"):
        self.name, self._size, self._stray = name, size or ANY_SENSOR, stray
        self.seen = 0
        """Number of events so far, with those beside the sensor."""
        self.stray_count = 0
        self._first_stray = ""

    def pack(self, t: np.ndarray, x: np.ndarray, y: np.ndarray, p: np.ndarray) -> Packed:
        """Return the events within the sensor; coordinates need a type that holds 2·H·W."""
        height, width = self._size
        if len(x) and (int(x.max()) >= width or int(y.max()) >= height or _any_negative(x) or _any_negative(y)):
            outside = (x >= width) | (y >= height) | (x < 0) | (y < 0)
            self._note(outside, x, y)
            t, x, y, p = (column[~outside] for column in (t, x, y, p))
            self.seen += int(np.count_nonzero(outside))
        self.seen += len(x)
        return Packed(t, ((y * width + x) * 2 + p).astype(np.int64, copy=False))

    def _note(self, outside: np.ndarray, x: np.ndarray, y: np.ndarray) -> None:
        if not self.stray_count:
            wrong = int(np.argmax(outside))
            self._first_stray = (
                f"event {self.seen + wrong:,} (the first is 0) lies at column {x[wrong]}, row {y[wrong]}"
            )
        self.stray_count += int(np.count_nonzero(outside))

    def strays(self) -> str:
        height, width = self._size
        return f"{self.stray_count:,} events beside the sensor of {width} × {height}"

    def check(self, rest: Iterator[Packed]) -> None:
        """Refuse events beside the sensor; `rest` is read to count them all.

        Raises:
            ValueError: there are some, and they are not to be dropped.
        """
        if not self.stray_count or self._stray == "drop":
            return
        at_least = ""
        try:
            for _ in rest:
                pass
        except (ValueError, OSError):
            at_least = "at least "
        raise ValueError(
            f"{self.first_stray()}; {at_least}{self.stray_count:,} events of {self.seen:,} lie beside it: the file is "
            'damaged or of another camera, or they are noise, which stray="drop" leaves out (--data.stray drop)'
        )

    def first_stray(self) -> str:
        height, width = self._size
        return f"{self.name}: {self._first_stray}, expected a sensor of {width} × {height}"


def pack(name: str, size: tuple[int, int], first: int, t: np.ndarray, x: np.ndarray, y: np.ndarray, p: np.ndarray):
    """Pack events of a sensor of (H, W); `first` is the number of the first event, for the message.

    Raises:
        ValueError: a coordinate outside the sensor.
    """
    packer = Packer(name, size)
    packer.seen = first
    packed = packer.pack(t, x, y, p)
    if packer.stray_count:
        raise ValueError(f"{packer.first_stray()}; it is damaged or of another camera")
    return packed


def _any_negative(column: np.ndarray) -> bool:
    return column.dtype.kind == "i" and int(column.min()) < 0
