"""Error messages for unknown names, which suggest the nearest known one."""

import difflib
from collections.abc import Iterable


def nearest(name: str, known: list[str]) -> str:
    """Return "; did you mean X?" with the known name closest to `name`, or "" if none is close."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else ""


def unknown(what: str, name: str, known: Iterable[str]) -> ValueError:
    """Return the error for an unknown name; its message suggests the nearest known name and lists all."""
    names = list(known)
    return ValueError(f"unknown {what} {name!r}{nearest(name, names) or ';'} known: {', '.join(names)}")
