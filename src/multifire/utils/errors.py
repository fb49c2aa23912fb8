"""Error messages that name the nearest known name."""

import difflib
from collections.abc import Iterable


def nearest(name: str, known: list[str]) -> str:
    """`; did you mean X?` for the known name closest to `name`, or an empty string."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else ""


def unknown(what: str, name: str, known: Iterable[str]) -> ValueError:
    """The error for an unknown name; it suggests the nearest known one and lists all."""
    names = list(known)
    return ValueError(f"unknown {what} {name!r}{nearest(name, names) or ';'} known: {', '.join(names)}")
