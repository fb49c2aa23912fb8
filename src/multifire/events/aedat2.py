"""Reader of AEDAT 2.0, in the address layouts of the DVS128 and of the DAVIS cameras.

The chip is that of the header; without one the addresses say the layout, and for a DAVIS the sensor's size too if they
reach the edges of a known one. Otherwise the user is asked for the size.

Source: https://gitlab.com/inivation/inivation-docs, "Software user guides / AEDAT file formats", and jAER's
DavisChip.java.
"""

import re
from collections.abc import Iterable, Iterator
from typing import Literal

import numpy as np

from multifire.events.aedat import DVS128, SENSOR_SIZES, read_header, size_of, stated_size
from multifire.events.recording import ByteStream, Closable, Packed, Packer, Recording, Stray
from multifire.utils.log import log

RECORD = 8
WRAP = 1 << 32
SPECIAL = 0x8000  # DVS128: set for an edge on the camera's synchronisation input, which is no pixel
OTHER = 1 << 31 | 1 << 10  # DAVIS: a sample of a picture or of the inertial sensor, or an edge on the external input
X_BITS, Y_BITS = 10, 9
LAYOUT_BYTES = 1 << 18
"""The layout is told from so many bytes, however many are read at a time."""
NEAR_EDGE = 4
"""A sensor is told from the addresses if events lie within so many pixels of its last column and its last row."""

START_COMMENT = b"# times in us count from: "

Layout = Literal["dvs128", "davis"]


def open_aedat2(stream: ByteStream, given: tuple[int, int] | None, stray: Stray, own: Closable | None) -> Recording:
    """Open an AEDAT 2.0 recording; `given` is the (H, W) of a DAVIS if the header names none.

    Raises:
        ValueError: a header without end.
    """
    header = list(read_header(stream))
    chip = _chip(header)
    size = next((size for size in map(stated_size, header) if size), None) or size_of(chip)
    start = next((start for start in map(_stated_start, header) if start), 0)
    layout = ("dvs128" if chip.startswith(b"DVS128") else "davis") if size else _layout(stream)
    if layout == "dvs128":
        return Recording(stream.name, "aedat2", DVS128, _read_dvs128(stream, Clock(start)), own)
    size = size or given or _size_of_addresses(stream)
    packer = Packer(stream.name, size, stray)
    return Recording(stream.name, "aedat2", size, _read_davis(stream, packer, Clock(start)), own, packer=packer)


def _stated_start(line: bytes) -> int:
    """Return the µs from which times count, from the comment with which multifire states them; else 0."""
    match = re.fullmatch(START_COMMENT + rb"(\d{1,18})", line)
    return int(match[1]) if match else 0


def _chip(header: Iterable[bytes]) -> bytes:
    """Return the chip's name in a header's line such as `# AEChip: eu.seebetter.ini.chips.davis.Davis346blue`."""
    found = b""
    for line in header:
        match = re.match(rb"#\s*AEChip:\s*(?:\S*\.)?(\w+)", line)
        found = found or (match[1].upper() if match else b"")
    return found


def _layout(stream: ByteStream) -> Layout:
    """Tell the layout from the first addresses: events of a DAVIS have no bit below the tenth, others bit 31."""
    data = stream.peek(LAYOUT_BYTES)
    address = np.frombuffer(data, ">u4", len(data) // RECORD * 2)[::2]
    davis = (address >= 1 << 31) | ((address >= 2 * SPECIAL) & (address & 0x3FF == 0))
    return "davis" if 2 * np.count_nonzero(davis) > len(address) else "dvs128"


def _size_of_addresses(stream: ByteStream) -> tuple[int, int] | None:
    """Return (H, W) of the smallest known DAVIS that holds all events, if they reach its edges."""
    width = height = 0
    for data in stream.rest():
        address = np.frombuffer(data, ">u4", len(data) // RECORD * 2)[::2].astype(np.uint32)
        x, y = _coordinates(address[address & OTHER == 0])
        width, height = max(width, int(x.max(initial=0)) + 1), max(height, int(y.max(initial=0)) + 1)
    for size in sorted(set(SENSOR_SIZES.values()), key=lambda size: size[0] * size[1]):
        if 0 <= size[0] - height < NEAR_EDGE and 0 <= size[1] - width < NEAR_EDGE:
            log.info("%s: names no chip; its events fill a sensor of %s × %s", stream.name, size[1], size[0])
            return size
    return None


def _coordinates(address: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return (address >> 12) & ((1 << X_BITS) - 1), (address >> 22) & ((1 << Y_BITS) - 1)


def _read_davis(stream: ByteStream, packer: Packer, clock: "Clock") -> Iterator[Packed]:
    """Yield the events of a DAVIS.

    Eight bytes each, big-endian: address a [u32], time in µs [u32], which wraps after 71.6 minutes.
    x = (a >> 12) & 1023, y = (a >> 22) & 511, p = (a >> 11) & 1. Records with bit 31 or 10 are not events.
    """
    skipped = 0
    for _, data in stream.records(RECORD):
        both = np.frombuffer(data, ">u8").astype(np.uint64)
        address = (both >> 32).astype(np.uint32)
        other = address & OTHER
        if other.any():
            pixels = other == 0
            skipped += len(pixels) - int(np.count_nonzero(pixels))
            address, both = address[pixels], both[pixels]
        both &= WRAP - 1
        x, y = _coordinates(address)
        yield packer.pack(clock.unwrap(both.view(np.int64)), x, y, (address >> 11) & 1)
    if skipped:
        log.info("%s: skipped %s records of pictures, inertia or the external input", stream.name, f"{skipped:,}")


def _read_dvs128(stream: ByteStream, clock: "Clock") -> Iterator[Packed]:
    """Yield the events of a DVS128.

    Eight bytes each, big-endian: address a [u32], time in µs [u32], which wraps after 71.6 minutes.
    x = 127 − ((a >> 1) & 127), y = (a >> 8) & 127, p = a & 1.

    Raises:
        ValueError: an address outside a DVS128.
    """
    special = 0
    for first, data in stream.records(RECORD):
        both = np.frombuffer(data, ">u8").astype(np.uint64)
        address = (both >> 32).view(np.int64)
        both &= WRAP - 1
        t = clock.unwrap(both.view(np.int64))
        if int(address.max(initial=0)) >= SPECIAL:
            _check_addresses(address, first, stream.name)
            pixels = address < SPECIAL
            special += len(pixels) - int(np.count_nonzero(pixels))
            address, t = address[pixels], t[pixels]
        address ^= 0xFE
        yield Packed(t, address)  # (y·128 + 127 − x')·2 + p is the address with the seven bits of x' inverted
    if special:
        log.info("%s: skipped %s marks of its synchronisation input", stream.name, f"{special:,}")


def _check_addresses(address: np.ndarray, first: int, name: str) -> None:
    wrong = np.flatnonzero(address >= 2 * SPECIAL)
    if len(wrong):
        raise ValueError(
            f"{name}: event {first + wrong[0]:,} (the first is 0) has address {address[wrong[0]]:#x}, outside the "
            "128 × 128 pixels of a DVS128; the file is damaged or of another camera"
        )


class Clock:
    """Unwraps a 32-bit clock that began at `start`: a fall by more than half its range is a wrap, not a step back."""

    def __init__(self, start: int = 0):
        self._last, self._epoch, self.start = 0, 0, start

    def unwrap(self, t: np.ndarray) -> np.ndarray:
        if not len(t):
            return t
        low, high = min(int(t.min()), self._last), max(int(t.max()), self._last)
        if high - low <= WRAP // 2:  # no step can be a wrap
            self._last = int(t[-1])
            before = self._epoch * WRAP + self.start
            return t + before if before else t
        steps = np.diff(t, prepend=self._last)
        turns = self._epoch + np.cumsum((steps < -WRAP // 2).astype(np.int64) - (steps > WRAP // 2))
        epochs = turns - np.minimum(np.minimum.accumulate(turns), 0)
        self._last, self._epoch = int(t[-1]), int(epochs[-1])
        return t + epochs * WRAP + self.start
