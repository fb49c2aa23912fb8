"""An open recording, and the stream of bytes that it is read from."""

from collections.abc import Iterator
from typing import BinaryIO, NamedTuple, Protocol, Self

import numpy as np

from multifire.utils.log import log

EVENT_DTYPE = np.dtype([("t", "<i8"), ("x", "<i2"), ("y", "<i2"), ("p", "i1")])
"""An event: time in µs, column, row, polarity (1: brighter, 0: darker)."""

CHUNK_BYTES = 1 << 18
"""Bytes read at a time; the events made of them fit into a core's caches."""
MAX_HEADER = 16 << 20  # jAER writes 5 KB
ANY_SENSOR = (1 << 15, 1 << 15)  # AEDAT 3.1 has 15 bits for a coordinate


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

    def _check_header(self, length: int) -> None:
        if length > MAX_HEADER:
            raise ValueError(f"{self.name}: its header is longer than {MAX_HEADER:,} bytes; not a recording")

    def _fetch(self, count: int) -> bytes:
        data = self._file.read(count)
        while 0 < len(data) < count and (more := self._file.read(count - len(data))):
            data += more
        return data


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
    ):
        self.name = name
        self.format = format
        self.sensor_size = sensor_size
        """(H, W) in pixels; None if the file does not state it."""
        self.backwards = 0
        """Number of times that time ran backwards so far, in the file's order."""
        self._packed, self._file, self._allow_empty = packed, file, allow_empty
        self._last = -(1 << 63)

    @property
    def raster(self) -> tuple[int, int]:
        """(H, W) used by `Packed.pixel`."""
        return self.sensor_size or ANY_SENSOR

    def packed(self) -> Iterator[Packed]:
        """Yield the events in the file's order, sorted by time (stably) within each chunk.

        Raises:
            ValueError: a damaged file, an event outside the sensor, or no events.
        """
        count = 0
        for chunk in self._packed:
            if len(chunk.t):
                count += len(chunk.t)
                yield self._in_order(chunk)
        if not count and not self._allow_empty:
            raise ValueError(f"{self.name}: holds no event; record it anew or leave it out")
        if self.backwards:
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


def pack(name: str, size: tuple[int, int], first: int, t: np.ndarray, x: np.ndarray, y: np.ndarray, p: np.ndarray):
    """Pack events of a sensor of (H, W); `first` is the number of the first event, for the message.

    Raises:
        ValueError: a coordinate outside the sensor.
    """
    height, width = size
    if len(x) and (int(x.max()) >= width or int(y.max()) >= height):
        wrong = int(np.argmax((x >= width) | (y >= height)))
        raise ValueError(
            f"{name}: event {first + wrong:,} (the first is 0) lies at column {x[wrong]}, row {y[wrong]}, "
            f"expected a sensor of {width} × {height}; the file is damaged or of another camera"
        )
    return Packed(t, ((y * width + x) * 2 + p).astype(np.int64, copy=False))
