"""Recordings of known events in each format, encoded by hand."""

import io
import struct

import numpy as np

from multifire.events import EVENT_DTYPE

AEDAT2_HEADER = b"#!AER-DAT2.0\r\n# of a test\r\n"
AEDAT31_HEADER = b"#!AER-DAT3.1\r\n#Format: RAW\r\n#Source 1: DVS128\r\n#!END-HEADER\r\n"


class NamedBytes(io.BytesIO):
    """A file in memory that has a name."""

    def __init__(self, content: bytes, name: str = "made"):
        super().__init__(content)
        self.name = name


def events_of(rows) -> np.ndarray:
    """Return an array of events from rows (t, x, y, p)."""
    return np.array([tuple(row) for row in rows], EVENT_DTYPE)


def random_events(count: int, size: int = 128, last_us: int = 1_000_000, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    events = np.empty(count, EVENT_DTYPE)
    events["t"] = np.sort(rng.integers(0, last_us, count))
    for name, above in (("x", size), ("y", size), ("p", 2)):
        events[name] = rng.integers(0, above, count)
    return events


def encode_aedat2(events) -> bytes:
    return AEDAT2_HEADER + b"".join(
        struct.pack(">II", int(y) << 8 | (127 - int(x)) << 1 | int(p), int(t) & 0xFFFFFFFF) for t, x, y, p in events
    )


def packet(events, *, overflow=0, kind=1, source=1, number=None, capacity=None, room=0, valid=1) -> bytes:
    """Encode a packet of AEDAT 3.1; `room` is the number of unused event slots at its end."""
    number = len(events) if number is None else number
    capacity = number + room if capacity is None else capacity
    head = struct.pack("<HHIIIIII", kind, source, 8, 4, overflow, capacity, number, number)
    body = b"".join(
        struct.pack("<II", int(x) << 17 | int(y) << 2 | int(p) << 1 | valid, int(t) - (overflow << 31))
        for t, x, y, p in events
    )
    return head + body + bytes(8 * room)


def encode_nmnist(events) -> bytes:
    return b"".join(bytes([x, y, int(p) << 7 | int(t) >> 16, int(t) >> 8 & 255, int(t) & 255]) for t, x, y, p in events)
