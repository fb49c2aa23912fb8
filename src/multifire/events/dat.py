"""Reader of Prophesee's DAT, versions 1 and 2.

faery reads DAT too, but replaces a time that runs backwards or wraps by the one before it, and does not read a file
with an event beside the sensor.

Source: https://docs.prophesee.ai, "File formats / DAT", and Prophesee's automotive toolbox (dat_events_tools.py).
"""

import re
from collections.abc import Iterator

import numpy as np

from multifire.events.aedat2 import Clock
from multifire.events.recording import ByteStream, Closable, Packed, Packer, Recording, Stray

RECORD = 8
CD_TYPES = (0, 12)
"""Types of events that are changes of brightness: 0 in version 1, 12 in version 2."""
MAX_LINES, MAX_LINE = 256, 1 << 12
MAX_PIXELS = 1 << 14


def looks_like_dat(head: bytes) -> bool:
    """Return True if lines that begin with `%` are followed by the type and the size of DAT's events."""
    end = 0
    while head[end : end + 1] == b"%" and b"\n" in head[end:]:
        end = head.index(b"\n", end) + 1
    is_text = all(31 < byte < 127 or byte in b"\t\r\n" for byte in head[:end])
    return end > 0 and is_text and len(head) > end + 1 and head[end + 1] == RECORD and head[end] < 32


def open_dat(stream: ByteStream, given: tuple[int, int] | None, stray: Stray, own: Closable | None) -> Recording:
    """Open a DAT recording.

    Raises:
        ValueError: events of another kind or version.
    """
    fields = dict(_header(stream))
    version = fields.get(b"version", 1)
    kind, bytes_each = stream.read(2)
    if kind not in CD_TYPES or bytes_each != RECORD or version not in (1, 2):
        raise ValueError(
            f"{stream.name}: DAT of version {version} with events of type {kind} and {bytes_each} bytes, expected "
            "version 1 or 2, type 0 or 12, and 8 bytes; write it anew with Metavision's tools"
        )
    size = (fields.get(b"height", 0), fields.get(b"width", 0))
    size = size if all(0 < side <= MAX_PIXELS for side in size) else given
    packer = Packer(stream.name, size, stray)
    return Recording(stream.name, "dat", size, _read(stream, version, packer), own, packer=packer)


def _header(stream: ByteStream) -> Iterator[tuple[bytes, int]]:
    """Yield the names and numbers in the lines that begin with `%`."""
    for _ in range(MAX_LINES):
        ahead = stream.peek(MAX_LINE)
        if not ahead.startswith(b"%") or b"\n" not in ahead:
            return
        line = stream.read(ahead.index(b"\n") + 1)
        if match := re.match(rb"%\s*(\w+)\s+(\d{1,6})\s*$", line):
            yield match[1].lower(), int(match[2])
    raise ValueError(f"{stream.name}: its header has more than {MAX_LINES} lines; not a recording")


def _read(stream: ByteStream, version: int, packer: Packer) -> Iterator[Packed]:
    """Yield the events of eight bytes, little-endian: time in µs [u32], which wraps after 71.6 minutes, data d [u32].

    Version 2: x = d & 16383, y = (d >> 14) & 16383, p = d >> 28.
    Version 1: x = d & 511, y = (d >> 9) & 255, p = (d >> 17) & 1.
    """
    clock = Clock()
    for _, data in stream.records(RECORD):
        both = np.frombuffer(data, "<u8")
        t = clock.unwrap((both & 0xFFFFFFFF).astype(np.int64))
        d = (both >> 32).astype(np.uint32)
        if version == 2:
            yield packer.pack(t, d & 0x3FFF, (d >> 14) & 0x3FFF, (d >> 28) != 0)
        else:
            yield packer.pack(t, d & 0x1FF, (d >> 9) & 0xFF, (d >> 17) & 1)
