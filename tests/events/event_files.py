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


def sensor_events(width: int, height: int, count: int = 2000, seed: int = 0, start_us: int = 0) -> np.ndarray:
    """Return random events of a sensor in order of time."""
    events = random_events(count, 1, 2_000_000, seed)
    rng = np.random.default_rng(seed + 1)
    events["t"] += start_us
    events["x"], events["y"] = rng.integers(0, width, count), rng.integers(0, height, count)
    events["p"] = rng.integers(0, 2, count)
    return events


def encode_davis(events, chip: str = "", other: np.ndarray | None = None, flag: int = 1 << 31) -> bytes:
    """Encode AEDAT 2.0 of a DAVIS; where `other` is True the record carries `flag` and is no event."""
    address = (events["y"].astype("u4") << 22) | (events["x"].astype("u4") << 12) | (events["p"].astype("u4") << 11)
    if other is not None:
        address[other] |= np.uint32(flag)
    header = AEDAT2_HEADER + (f"# AEChip: {chip}\r\n".encode() if chip else b"")
    return header + np.stack([address, (events["t"] & 0xFFFFFFFF).astype("u4")], 1).astype(">u4").tobytes()


def encode_text(events, line: str = "{t} {x} {y} {p}", first: str = "", scale: float = 1) -> bytes:
    """Encode one line for each event; times are divided by `scale` if it is not 1."""
    rows = ((t / scale if scale != 1 else t, x, y, p) for t, x, y, p in events.tolist())
    return (first + "".join(line.format(t=t, x=x, y=y, p=p) + "\n" for t, x, y, p in rows)).encode()
