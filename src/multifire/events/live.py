"""Cut a live stream of events into frames: from a recording, standard input or a UDP port.

A record is an event of EVENT_DTYPE, packed and little-endian, 13 bytes: t in µs [i64], x [i16], y [i16], p [i8], as
`read_events(path).tobytes()` holds them. Standard input is a sequence of records; a UDP packet holds one or more
complete records.
"""

import os
import socket
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple, Self

import numpy as np

from multifire.events.frames import FOREVER, FrameOptions, cells_of
from multifire.events.recording import CHUNK_BYTES, EVENT_DTYPE, Packed, Packer, Stray, pack
from multifire.utils.log import log

LOCALHOST = "127.0.0.1"
PACKET_BYTES = 1 << 16


class LiveFrame(NamedTuple):
    """A complete frame."""

    counts: np.ndarray
    """uint8 [2, H, W], saturating at 255, like prepared frames."""
    end_us: int
    """End of its slice in the camera's time, µs."""
    events: int


class LiveFrames:
    """Cuts a stream of events into slices of `duration_us` from its first event on, like `frames_of_windows` a file.

    Every T frames are a sample. A frame is complete when the first later event arrives. A sample without events is
    skipped, and the next one begins with the next event. An event before the current frame is too late: it is skipped
    and counted in `late`. An event earlier by more than a sample means that the camera's clock was reset, and begins a
    new sample.
    """

    def __init__(self, sensor_size: tuple[int, int], options: FrameOptions, name: str):
        if options.slicing != "duration":
            raise ValueError(
                f"{name}: this run's frames are equal shares of a whole recording (slicing by {options.slicing}), "
                "which a stream has not; play a file, or train with --data.slicing duration"
            )
        self._options, self._cells = options, cells_of(sensor_size, options)
        self._open, self._start = False, 0
        self._counts, self._events = self._none(), 0
        self._emitted = 0
        self.late = 0

    def push(self, chunk: Packed) -> Iterator[LiveFrame]:
        """Add events, sorted by time, and yield the frames that they complete."""
        t, pixel = chunk
        while len(t):
            if not self._open:
                self._open, self._start = True, int(t[0])
            late = int(np.searchsorted(t, self._start))
            if late and self._start - int(t[0]) > self._sample_us:
                yield from self.finish()
                continue
            self.late += late
            t, pixel = t[late:], pixel[late:]
            inside = int(np.searchsorted(t, self._start + self._options.duration_us))
            self._add(pixel[:inside])
            t, pixel = t[inside:], pixel[inside:]
            if len(t):
                yield self._emit()
                yield from self._skip_silence(int(t[0]))

    def finish(self) -> Iterator[LiveFrame]:
        """Yield the current frame, and empty ones until the sample has T frames; the next event begins a new sample."""
        if self._open:
            yield self._emit()
            while self._emitted % self._options.timesteps:
                yield self._emit()
            self._open = False

    @property
    def _sample_us(self) -> int:
        return self._options.timesteps * self._options.duration_us

    def _skip_silence(self, next_us: int) -> Iterator[LiveFrame]:
        """Yield empty frames up to that of the next event; skip a sample that would have no events."""
        while next_us >= self._start + self._options.duration_us:
            if self._emitted % self._options.timesteps == 0 and next_us >= self._start + self._sample_us:
                self._start = next_us
            else:
                yield self._emit()

    def _add(self, pixel: np.ndarray) -> None:
        counted = np.bincount(self._cells.take(pixel), minlength=self._counts.size + 1)[:-1]  # the last: beside it
        self._counts += counted
        self._events += int(counted.sum())

    def _emit(self) -> LiveFrame:
        most = 1 if self._options.binary else 255
        counts = np.minimum(self._counts, most).astype(np.uint8).reshape(2, *self._options.size)
        self._start += self._options.duration_us
        frame = LiveFrame(counts, self._start, self._events)
        self._counts, self._events, self._emitted = self._none(), 0, self._emitted + 1
        return frame

    def _none(self) -> np.ndarray:
        return np.zeros(2 * self._options.size[0] * self._options.size[1], np.int64)


def packed_records(data: bytes, sensor_size: tuple[int, int], name: str, stray: Stray = "refuse") -> Packed:
    """Return the events of complete records, sorted by time.

    Raises:
        ValueError: an incomplete record, an event beside the sensor unless they are dropped, a polarity that is not
            0 or 1, or a time below 0 or above 2⁶².
    """
    if not data or len(data) % EVENT_DTYPE.itemsize:
        size = EVENT_DTYPE.itemsize
        raise ValueError(f"{name}: {len(data):,} bytes, expected records of {size}: t i64, x i16, y i16, p i8")
    events = np.frombuffer(data, EVENT_DTYPE)
    t, x, y, p = (events[field].astype(np.int64) for field in ("t", "x", "y", "p"))
    if min(x.min(), y.min(), p.min(), t.min()) < 0 or p.max() > 1 or t.max() >= FOREVER:
        wrong = int(np.argmax((x < 0) | (y < 0) | (p < 0) | (p > 1) | (t < 0) | (t >= FOREVER)))
        raise ValueError(f"{name}: record {wrong:,} is {events[wrong]}, expected t, x, y >= 0 and p 0 or 1")
    drops = stray == "drop"
    chunk = Packer(name, sensor_size).pack(t, x, y, p) if drops else pack(name, sensor_size, 0, t, x, y, p)
    order = np.argsort(chunk.t, kind="stable")
    return Packed(chunk.t[order], chunk.pixel[order])


class Records:
    """Yields chunks of events from an open stream of records as soon as they arrive."""

    def __init__(self, file: BinaryIO, sensor_size: tuple[int, int], name: str, stray: Stray = "refuse"):
        self._handle, self._sensor_size, self.name = file.fileno(), sensor_size, name
        self._stray: Stray = stray
        self.dropped = 0

    def __iter__(self) -> Iterator[Packed]:
        """Yield chunks. Raises ValueError for an invalid record, since no later record can be trusted."""
        rest = b""
        while data := os.read(self._handle, CHUNK_BYTES):
            data = rest + data
            whole = len(data) - len(data) % EVENT_DTYPE.itemsize
            rest = data[whole:]
            if whole:
                packed = packed_records(data[:whole], self._sensor_size, self.name, self._stray)
                self.dropped += whole // EVENT_DTYPE.itemsize - len(packed.t)
                yield packed
        if rest:
            log.warning("%s: ends in the middle of a record: its last %s bytes are not read", self.name, len(rest))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Say how many events were dropped; the stream's owner closes it."""
        _log_dropped(self.name, self.dropped)


def _log_dropped(name: str, count: int) -> None:
    if count:
        log.warning("%s: %s events beside the sensor were left out", name, f"{count:,}")


class UdpRecords:
    """Yields chunks of events from packets sent to a UDP port of this machine by this machine.

    Invalid packets are skipped: the first one is logged, `malformed` counts them. If packets arrive faster than they
    are read, the system drops them once its buffer is full.
    """

    def __init__(self, port: int, sensor_size: tuple[int, int], stray: Stray = "refuse"):
        """Open the port; 0 chooses a free one, stored in `port`.

        Raises:
            OSError: the port is taken.
        """
        if not 0 <= port < 1 << 16:
            raise ValueError(f"UDP port is {port}, expected 0 to 65535")
        self._sensor_size = sensor_size
        self._stray: Stray = stray
        self.malformed = self.dropped = 0
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        try:
            self._socket.bind((LOCALHOST, port))
        except OSError as error:
            self._socket.close()
            raise OSError(f"UDP port {port} of {LOCALHOST}: {error.strerror}; choose another --udp") from None
        self.port = self._socket.getsockname()[1]
        self.name = f"UDP port {self.port} of {LOCALHOST}"

    def __iter__(self) -> Iterator[Packed]:
        while True:
            data = self._socket.recv(PACKET_BYTES)
            try:
                packed = packed_records(data, self._sensor_size, "UDP packet", self._stray)
            except ValueError as error:
                self.malformed += 1
                if self.malformed == 1:
                    log.warning("%s; it is skipped, and further ones are only counted", error)
                continue
            self.dropped += len(data) // EVENT_DTYPE.itemsize - len(packed.t)
            yield packed

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()
        _log_dropped(self.name, self.dropped)
        if self.malformed:
            log.warning("%s malformed packets were skipped", f"{self.malformed:,}")
