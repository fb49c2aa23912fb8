"""Reader of Prophesee's EVT2 and EVT3, the content of `.raw` files.

faery reads them too, but refuses a whole file for one event beside the sensor, which real cameras write.

Source: https://docs.prophesee.ai, "Data / Encoding formats / EVT 2.0" and "EVT 3.0".
"""

import re
from collections.abc import Iterator

import numpy as np

from multifire.events.recording import ByteStream, Closable, Packed, Packer, Recording, Stray

CHUNK = 1 << 15  # bytes; 2 bytes of EVT3 hold up to 12 events
MAX_HEADER_LINES, MAX_LINE = 256, 1 << 12
MAX_PIXELS = 1 << 11  # both formats have 11 bits for a coordinate
EVT2_OFF, EVT2_ON, EVT2_TIME_HIGH = 0, 1, 8
EVT2_TURN = 1 << 34
"""µs after which the clock of EVT2 begins anew; that of EVT3 does after EVT3_TURN."""
Y, X, BASE_X, VECTOR_12, VECTOR_8, TIME_LOW, TIME_HIGH = 0, 2, 3, 4, 5, 6, 8
EVT3_TURN = 1 << 24


def looks_like_evt(head: bytes) -> bool:
    """Return True if the head's lines of `%` name the format EVT."""
    return head.startswith(b"%") and bool(re.search(rb"^% *(?:format *EVT|evt )\d", head, re.MULTILINE | re.IGNORECASE))


def open_evt(stream: ByteStream, given: tuple[int, int] | None, stray: Stray, own: Closable | None) -> Recording:
    """Open a recording in EVT2 or EVT3.

    Raises:
        ValueError: another version, or a header without end.
    """
    header = b"\n".join(_header_lines(stream))
    version = re.search(rb"^% *(?:format *EVT|evt )(\d+(?:\.\d+)?)", header, re.MULTILINE | re.IGNORECASE)
    number = version[1].decode().removesuffix(".0") if version else "?"
    if number not in ("2", "3"):
        raise ValueError(f"{stream.name}: is EVT {number}, expected EVT 2.0 or 3.0; convert it with Metavision's tools")
    size = _size(header) or given
    packer = Packer(stream.name, size, stray)
    read = _read_evt2 if number == "2" else _read_evt3
    return Recording(stream.name, f"evt{number}", size, read(stream, packer), own, packer=packer)


def _header_lines(stream: ByteStream) -> Iterator[bytes]:
    for _ in range(MAX_HEADER_LINES):
        ahead = stream.peek(MAX_LINE)
        if not ahead.startswith((b"% ", b"%\n")) or b"\n" not in ahead:
            return
        line = stream.read(ahead.index(b"\n") + 1).strip()
        if line == b"% end":
            return
        yield line
    raise ValueError(f"{stream.name}: its header has more than {MAX_HEADER_LINES} lines; not a recording")


def _size(header: bytes) -> tuple[int, int] | None:
    """Return (H, W) from `% format EVT3;height=720;width=1280`, `% geometry 1280x720` or lines `% Width 1280`."""
    sides = []
    for name in (rb"height", rb"width"):
        match = re.search(name + rb"[= ](\d{1,5})\b", header, re.IGNORECASE)
        sides.append(int(match[1]) if match else 0)
    if geometry := re.search(rb"geometry:? *(\d{1,5})x(\d{1,5})\b", header, re.IGNORECASE):
        sides = [int(geometry[2]), int(geometry[1])]
    return (sides[0], sides[1]) if all(0 < side <= MAX_PIXELS for side in sides) else None


class _Clock:
    """Extends the upper bits of a camera's clock, which begin anew every `turn` µs."""

    def __init__(self, turn: int):
        self._turn, self._last, self._turns = turn, 0, 0

    def extend(self, high_us: np.ndarray) -> np.ndarray:
        """Return consecutive values of the upper bits, in µs, without the turns."""
        if not len(high_us):
            return high_us
        turned = np.cumsum(np.diff(high_us, prepend=self._last) < -self._turn // 2)
        extended = high_us + (self._turns + turned) * self._turn
        self._last, self._turns = int(high_us[-1]), self._turns + int(turned[-1])
        return extended


class _Held:
    """A value that words of one kind set, and that holds for all words until the next of them."""

    def __init__(self, value: int):
        self._value = value

    def at_each(self, sets: np.ndarray, values: np.ndarray) -> np.ndarray:
        """Return the value at each word; `sets` marks the words that set it, to `values` one after the other."""
        all_values = np.concatenate([[self._value], values])
        self._value = int(all_values[-1])
        return all_values[np.cumsum(sets)]


def _read_evt2(stream: ByteStream, packer: Packer) -> Iterator[Packed]:
    """Yield the events in words of 32 bits, little-endian: kind [4 bits], then

    time high [28 bits]: bits 6 to 33 of the time in µs; or an event: time low [6], x [11], y [11].
    Events before the first time high have no time and are skipped, as are words of other kinds.
    """
    clock, held = _Clock(EVT2_TURN), _Held(-1)
    for _, data in stream.records(4, CHUNK):
        words = np.frombuffer(data, "<u4").astype(np.int64)
        kind = words >> 28
        sets = kind == EVT2_TIME_HIGH
        high = held.at_each(sets, clock.extend((words[sets] & 0xFFFFFFF) << 6))
        events = (kind <= EVT2_ON) & (high >= 0)
        words, kind = words[events], kind[events]
        t = high[events] + ((words >> 22) & 0x3F)
        yield packer.pack(t, (words >> 11) & 0x7FF, words & 0x7FF, kind)


def _read_evt3(stream: ByteStream, packer: Packer) -> Iterator[Packed]:
    """Yield the events in words of 16 bits, little-endian: kind [4 bits], then 12 bits that say

    bits 12 to 23 of the time in µs (and bits 0 to 11 are 0); its bits 0 to 11; y of the events that follow;
    polarity and x of an event, or of the first pixel of vectors; which of the next 12 or 8 pixels fire.
    Events before the first time high have no time and are skipped, as are words of other kinds.
    """
    clock = _Clock(EVT3_TURN)
    held_high, held_low, held_y, held_p, held_x = _Held(-1), _Held(0), _Held(0), _Held(0), _Held(0)
    for _, data in stream.records(2, CHUNK):
        words = np.frombuffer(data, "<u2").astype(np.int64)
        kind, value = words >> 12, words & 0xFFF
        is_high = kind == TIME_HIGH
        high = held_high.at_each(is_high, clock.extend(value[is_high] << 12))
        sets_low = is_high | (kind == TIME_LOW)
        t = high + held_low.at_each(sets_low, np.where(is_high, 0, value)[sets_low])
        is_y, is_base = kind == Y, kind == BASE_X
        y = held_y.at_each(is_y, value[is_y] & 0x7FF)
        base_p = held_p.at_each(is_base, value[is_base] >> 11)
        pixels = np.where(kind == VECTOR_12, 12, np.where(kind == VECTOR_8, 8, 0))
        first_x = _first_pixels(is_base, value & 0x7FF, pixels, held_x)
        timed = high >= 0
        yield _events(packer, (kind == X) & timed, (pixels > 0) & timed, value, t, y, base_p, first_x, pixels)


def _first_pixels(is_base: np.ndarray, x: np.ndarray, pixels: np.ndarray, held: _Held) -> np.ndarray:
    """Return the x of each vector's first pixel: that of the base word, and of all vectors between them."""
    if not len(pixels):
        return pixels
    passed = np.cumsum(pixels) - pixels
    start = held.at_each(is_base, (x - passed)[is_base])
    held.at_each(np.ones(1, bool), np.array([int(start[-1]) + int(passed[-1] + pixels[-1])]))
    return start + passed


def _events(
    packer: Packer,
    single: np.ndarray,
    vector: np.ndarray,
    value: np.ndarray,
    t: np.ndarray,
    y: np.ndarray,
    base_p: np.ndarray,
    first_x: np.ndarray,
    pixels: np.ndarray,
) -> Packed:
    """Return the events of the words, in their order: one for each `single`, one for each bit of each `vector`."""
    bits = ((value[vector, None] >> np.arange(12)) & 1).astype(bool) & (np.arange(12) < pixels[vector, None])
    which, offset = np.nonzero(bits)
    of_vectors, of_singles = np.flatnonzero(vector)[which], np.flatnonzero(single)
    word = np.concatenate([of_singles, of_vectors])
    x = np.concatenate([value[of_singles] & 0x7FF, first_x[of_vectors] + offset])
    p = np.concatenate([value[of_singles] >> 11, base_p[of_vectors]])
    order = np.argsort(word, kind="stable")
    word = word[order]
    return packer.pack(t[word], x[order], y[word], p[order])
