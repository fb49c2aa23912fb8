"""Events in columns, as tables of any program hold them: names, types and units of t, x, y and p."""

import re
from collections.abc import Iterable

import numpy as np

from multifire.events.recording import Packed, Packer
from multifire.utils.log import log

NAMES = {
    "t": ("t", "ts", "time", "times", "timestamp", "timestamps"),
    "x": ("x", "xs", "column", "col"),
    "y": ("y", "ys", "row"),
    "p": ("p", "ps", "pol", "polarity", "polarities", "on"),
}
"""Names of the columns in lower case, without their unit."""
UNITS = {
    **dict.fromkeys(("us", "\N{MICRO SIGN}s", "\N{GREEK SMALL LETTER MU}s", "usec", "microseconds"), 1),
    **dict.fromkeys(("ms", "msec", "milliseconds"), 1_000),
    **dict.fromkeys(("s", "sec", "seconds"), 1_000_000),
}
"""µs of a unit."""
UNIT_NAMES = {1: "microseconds", 1_000: "milliseconds", 1_000_000: "seconds"}
EARLY_S = 1000  # simulators write many events at the time 0.0
MANY = 100  # among so many times, events of which each comes a second after the one before it are not a recording
LATEST = 1 << 62
LARGEST = (1 << 31) - 1  # coordinates beyond it are taken for this one, which no sensor has


def find_columns(names: Iterable[str]) -> dict[str, str] | None:
    """Return the name of each of the columns t, x, y and p, or None if one is missing."""
    found: dict[str, str] = {}
    for name in names:
        plain = _split_unit(name)[0]
        key = next((key for key, known in NAMES.items() if plain in known), None)
        if key and key not in found:
            found[key] = name
    return found if len(found) == len(NAMES) else None


def _split_unit(name: str) -> tuple[str, str]:
    plain = re.sub(r"@\d+$", "", name.strip().strip("\"'").lower())  # faery writes the sensor's size behind x and y
    units = "|".join([*UNITS, "ns"])
    match = re.fullmatch(rf"(\w+?)\s*[\[(]\s*(\w+)\s*[\])]|([a-z]+)_({units})", plain)
    return (match[1] or match[3], match[2] or match[4]) if match else (plain, "")


def choose_unit(name: str, column: str, first: np.ndarray) -> int:
    """Return the µs of the unit of a column of times, from its name, else from its first values; log it.

    Raises:
        ValueError: the name states another unit than µs, ms and s.
    """
    stated = _split_unit(column)[1]
    if stated and stated not in UNITS:
        raise ValueError(f"{name}: its column {column} is in {stated}, expected us, ms or s; write it anew")
    unit, why = (UNITS[stated], "its column says so") if stated else _guess_unit(first)
    log.info("%s: takes its times as %s: %s", name, UNIT_NAMES[unit], why)
    return unit


def _guess_unit(t: np.ndarray) -> tuple[int, str]:
    if t.dtype.kind == "f" and len(t) > 1 and 0 <= t[0] == t[-1] < EARLY_S:
        return UNITS["s"], "they are floats, and the first ones are equal"
    if t.dtype.kind != "f" or not np.isfinite(t).all() or (t == np.rint(t)).all():
        return 1, "they are whole numbers"
    if len(t) > 1 and (t[-1] - t[0]) / (len(t) - 1) >= (1 if len(t) >= MANY else 100):
        return 1, "they have fractions, but as seconds they would lie far apart"
    return UNITS["s"], "they have fractions"


def guess_columns(table: np.ndarray, name: str) -> tuple[int, int, int, int]:
    """Return the numbers of the columns t, x, y and p of a table of four columns without names.

    Raises:
        ValueError: another number of columns, or no column of polarities.
    """
    if table.ndim != 2 or table.shape[1] != 4:
        raise ValueError(f"{name}: has {table.shape[-1]} columns without names, expected t, x, y and p; name them")
    signs = [column for column in (3, 2, 1) if np.isin(table[:, column], (-1, 0, 1)).all()]
    if not signs:
        raise ValueError(f"{name}: no column holds only 0 and 1, or -1 and 1, expected one of polarities; name them")
    p = signs[0]
    others = [column for column in range(4) if column != p]
    growing = [column for column in others if (np.diff(table[:, column]) >= 0).all()]
    if not growing:  # some events are late
        growing = [max(others, key=lambda column: np.count_nonzero(np.diff(table[:, column]) >= 0))]
    t = max(growing, key=lambda column: (np.ptp(table[:, column]) > 0, -others.index(column)))
    if len(table) == 1 or np.ptp(table[:, t]) == 0:
        t = 0 if p == 3 else max(others)
    x, y = (column for column in others if column != t)
    return t, x, y, p


class Columns:
    """Turns columns of any number type into packed events.

    Times are whole µs or, with another unit, rounded to µs. Polarities are 0 and 1, -1 and 1, or booleans.
    """

    def __init__(self, packer: Packer, unit: int = 1, offset: int = 0):
        self._packer, self._unit, self._offset = packer, unit, offset
        self._zero = self._minus = False

    def pack(self, t: np.ndarray, x: np.ndarray, y: np.ndarray, p: np.ndarray) -> Packed:
        """Return the events of equally long columns.

        Raises:
            ValueError: what is no time, no pixel or no polarity.
        """
        if not len(t):
            return self._packer.pack(np.zeros(0, np.int64), *(np.zeros(0, np.int64) for _ in "xyp"))
        return self._packer.pack(self._times(t), self._pixels(x, "x"), self._pixels(y, "y"), self._polarities(p))

    def _times(self, t: np.ndarray) -> np.ndarray:
        self._check_numbers(t, "t")
        if t.dtype.kind == "f":
            with np.errstate(over="ignore"):  # what overflows is refused below
                t = np.rint(t.astype(np.float64) * self._unit)
            scale = 1
        else:
            scale = self._unit
        self._check(t, (t < 0) | (t >= (LATEST - self._offset) // scale), "time", "0 to 2^62 µs")
        return t.astype(np.int64) * scale + self._offset

    def _pixels(self, column: np.ndarray, name: str) -> np.ndarray:
        self._check_numbers(column, name)
        if column.dtype.kind == "f":
            self._check(column, column != np.rint(column), f"coordinate {name}", "whole numbers of pixels")
        elif column.dtype.itemsize < 4:
            return column.astype(np.int64)
        return np.clip(column, -1 if column.dtype.kind != "u" else 0, LARGEST).astype(np.int64)

    def _polarities(self, p: np.ndarray) -> np.ndarray:
        if p.dtype.kind == "b":
            return p
        self._check_numbers(p, "p")
        self._check(p, (p != 0) & (p != 1) & (p != -1), "polarity", "0 and 1, or -1 and 1")
        positive = p > 0
        self._minus |= bool(p.min() < 0)
        self._zero |= bool((p == 0).any())
        if self._minus and self._zero:
            raise ValueError(
                f"{self._packer.name}: has polarities -1, 0 and 1, expected 0 and 1, or -1 and 1; the file is damaged "
                "or its column p is another one"
            )
        return positive

    def _check_numbers(self, column: np.ndarray, name: str) -> None:
        if column.dtype.kind not in "buif":
            raise ValueError(
                f"{self._packer.name}: its column {name} holds {column.dtype}, expected numbers; write it anew"
            )
        if column.dtype.kind == "f":
            self._check(column, ~np.isfinite(column), f"value of {name}", "a finite number")

    def _check(self, column: np.ndarray, wrong: np.ndarray, what: str, expected: str) -> None:
        if wrong.any():
            at = int(np.argmax(wrong))
            raise ValueError(
                f"{self._packer.name}: event {self._packer.seen + at:,} (the first is 0) has the {what} {column[at]}, "
                f"expected {expected}; the file is damaged or its columns are others"
            )
