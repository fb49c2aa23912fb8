"""Reader of AEDAT 3.1, and of the header that it shares with AEDAT 2.0.

Source: https://gitlab.com/inivation/inivation-docs, "Software user guides / AEDAT file formats".
"""

import re
import struct
from collections.abc import Iterable, Iterator

import numpy as np

from multifire.events.recording import CHUNK_BYTES, ByteStream, Packed, Packer

DVS128 = (128, 128)

PACKET = struct.Struct("<HHIIIIII")
"""Type, source, event size, offset of the timestamp, its overflow, capacity, number of events, valid ones."""
POLARITY = 1
EVENT_BYTES = 8
MAX_OVERFLOW = 1 << 20  # 71 years
END_OF_HEADER = b"#!END-HEADER"
SENSOR_COMMENT = b"# sensor in pixels: "
MAX_HEADER_LINES = 1 << 14  # jAER writes about a hundred; millions would take half a minute

SENSOR_SIZES = {
    "DVS128": DVS128,
    "DAVIS128": (128, 128),
    "DAVIS208": (192, 208),
    "DAVIS240": (180, 240),
    "DAVIS346": (260, 346),
    "DAVIS640": (480, 640),
}
"""(H, W) by the beginning of the camera's name in a header."""


def read_header(stream: ByteStream) -> Iterator[bytes]:
    """Read the leading lines that begin with `#`, up to and including an end mark if there is one.

    Raises:
        ValueError: too many lines.
    """
    lines, ending = 0, b""
    while not _is_davis_event(stream.peek(4), ending) and (line := stream.read_header_line()):
        ending = ending or line[-2:]
        yield line.rstrip()
        if line.rstrip() == END_OF_HEADER:
            break
        lines += 1
        if lines > MAX_HEADER_LINES:
            raise ValueError(f"{stream.name}: its header has more than {MAX_HEADER_LINES:,} lines; not a recording")


def _is_davis_event(ahead: bytes, ending: bytes) -> bool:
    """Return True for an event of AEDAT 2.0 in row 140 to 143, whose first byte is `#`, and whose fourth one is 0.

    The second byte may be the end of a line, but is not that of a header whose first line ends with a carriage return.
    """
    return ahead[3:] == b"\0" and (b"\n" not in ahead or (ending == b"\r\n" and ahead[1:2] == b"\n"))


def sensor_of(header: Iterable[bytes]) -> tuple[int, int] | None:
    """Return (H, W) of the first camera in an AEDAT 3.1 header, or None if its size is unknown."""
    found = None
    for line in header:
        found = found or stated_size(line)
        source = None if found else re.match(rb"#-*\s*Source\s+\d+\s*:\s*(\w+)", line)
        found = found or (size_of(source[1]) if source else None)
    return found


def stated_size(line: bytes) -> tuple[int, int] | None:
    """Return (H, W) from the comment SENSOR_COMMENT, with which multifire states the size of any sensor."""
    match = re.fullmatch(SENSOR_COMMENT + rb"(\d{1,5})x(\d{1,5})", line)
    return (int(match[2]), int(match[1])) if match and min(int(match[1]), int(match[2])) > 0 else None


def size_of(camera: bytes) -> tuple[int, int] | None:
    """Return (H, W) of the camera of this name, or None if it is not known."""
    name = camera.decode("ascii", "replace").upper()
    return next((size for known, size in SENSOR_SIZES.items() if name.startswith(known)), None)


def read_aedat31(stream: ByteStream, packer: Packer) -> Iterator[Packed]:
    """Yield the polarity events of an AEDAT 3.1 recording, after its header.

    Packets of a header of 28 bytes and events of eight, little-endian: data d [u32], time in µs [u32]:
    x = d >> 17, y = (d >> 2) & 0x7FFF, p = (d >> 1) & 1, valid where d & 1; the time is overflow·2³¹ + t.
    Other types of packets and invalid events are skipped.

    Raises:
        ValueError: inconsistent packets.
    """
    for data, overflow in _gather(_polarity_payloads(stream)):
        both = np.frombuffer(data, "<u8")
        t = (both >> 32).view(np.int64)
        if isinstance(overflow, np.ndarray) or overflow:
            t = t + (overflow << 31)
        d = both.astype(np.uint32)
        if not np.bitwise_and.reduce(d) & 1:
            valid = (d & 1).astype(bool)
            t, d = t[valid], d[valid]
        yield packer.pack(t, d >> 17, (d >> 2) & 0x7FFF, (d >> 1) & 1)


def _polarity_payloads(stream: ByteStream) -> Iterator[tuple[bytes, int]]:
    """Yield the complete events of every polarity packet, and the overflow of their clock."""
    source_seen = None
    while True:
        at = stream.position
        head = stream.read(PACKET.size)
        if len(head) < PACKET.size:
            if head:
                stream.warn_cut("in the middle of a packet's header")
            return
        kind, source, size, offset, overflow, capacity, number, _ = PACKET.unpack(head)
        if number > capacity:
            raise _bad_packet(stream, at, f"{number:,} events in room for {capacity:,}")
        if overflow > MAX_OVERFLOW:
            raise _bad_packet(stream, at, f"a clock that has overflowed {overflow:,} times")
        if kind != POLARITY:
            if stream.skip(size * capacity) < size * capacity:
                stream.warn_cut(f"within the packet of type {kind} at byte {at:,}")
            continue
        if (size, offset) != (EVENT_BYTES, EVENT_BYTES // 2):
            raise _bad_packet(stream, at, f"events of {size:,} bytes with their time at {offset:,}, expected 8 and 4")
        if number and source_seen not in (None, source):
            raise _bad_packet(
                stream, at, f"events of source {source} behind those of {source_seen}, expected one camera"
            )
        source_seen = source if number else source_seen
        left = number * EVENT_BYTES
        while left:
            data = stream.read(min(left, CHUNK_BYTES))
            left -= len(data)
            if whole := len(data) - len(data) % EVENT_BYTES:
                yield data[:whole], overflow
            if not data or whole < len(data):
                have = number - -(-left // EVENT_BYTES)
                stream.warn_cut(f"within the packet at byte {at:,}, which has {have:,} of its {number:,} events")
                return
        stream.skip((capacity - number) * EVENT_BYTES)


def _bad_packet(stream: ByteStream, at: int, what: str) -> ValueError:
    return ValueError(f"{stream.name}: the packet at byte {at:,} has {what}; the file is damaged")


def _gather(payloads: Iterator[tuple[bytes, int]]) -> Iterator[tuple[bytes, int | np.ndarray]]:
    """Join small packets into larger chunks; the overflow is an array [events] if it changes within a chunk."""
    parts: list[tuple[bytes, int]] = []
    size = 0
    for data, overflow in payloads:
        parts.append((data, overflow))
        size += len(data)
        if size >= CHUNK_BYTES:
            yield _join(parts)
            parts, size = [], 0
    if parts:
        yield _join(parts)


def _join(parts: list[tuple[bytes, int]]) -> tuple[bytes, int | np.ndarray]:
    datas, overflows = zip(*parts, strict=True)
    joined = b"".join(datas)
    if min(overflows) == max(overflows):
        return joined, overflows[0]
    return joined, np.repeat(np.array(overflows, np.int64), [len(data) // EVENT_BYTES for data in datas])
