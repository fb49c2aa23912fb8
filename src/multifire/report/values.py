"""Values read from a stranger's files: checked, cut to a length, and formatted for a reader."""

import html
import statistics
import unicodedata
from collections.abc import Sequence
from typing import Any

MAX_ENTRIES = 1024
"""Entries of a list: layers, bins, classes."""
MAX_NUMBER = 1e30
"""Larger than any figure of a network; axes overflow not far beyond."""
MAX_TEXT = 160
"""Characters of a name."""


def clean(value: Any, spec: Any) -> Any:
    """Return `value` in the shape of `spec`: keys of a dict, items of a list, finite floats; None for anything else.

    If `spec` is `dict` itself, any numbers, texts and lists of numbers are kept.
    """
    if spec is dict:
        found = list(value.items())[:MAX_ENTRIES] if isinstance(value, dict) else []
        return {plain(key): kept for key, item in found if (kept := _free(item)) is not None}
    if isinstance(spec, dict):
        found = value if isinstance(value, dict) else {}
        return {key: clean(found.get(key), part) for key, part in spec.items()}
    if isinstance(spec, list):
        return [clean(item, spec[0]) for item in value[:MAX_ENTRIES]] if isinstance(value, list) else []
    if spec is str:
        return plain(value) if isinstance(value, str | int | float) else ""
    return value is True if spec is bool else number(value)


def _free(value: Any) -> Any:
    if isinstance(value, list):
        return [number(item) for item in value[:MAX_ENTRIES]]
    return plain(value) if isinstance(value, str) else number(value)


def number(value: Any) -> float | None:
    """Return a number that can be drawn; None for anything else, also for infinity and numbers near it."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return value if -MAX_NUMBER < value < MAX_NUMBER else None


def plain(text: Any) -> str:
    """Return text in one line without control or direction characters, cut to MAX_TEXT characters."""
    kept = "".join(c for c in str(text)[: 4 * MAX_TEXT] if unicodedata.category(c)[0] != "C")
    return kept if len(kept) <= MAX_TEXT else kept[: MAX_TEXT - 1] + "…"


class Table(list[dict[str, Any]]):
    """Rows that a notebook shows as a table."""

    def columns(self) -> list[str]:
        return list(dict.fromkeys(key for row in self for key in row))

    def _repr_html_(self) -> str:
        def line(tag: str, cells: Sequence[Any]) -> str:
            return "<tr>" + "".join(f"<{tag}>{html.escape(show(cell))}</{tag}>" for cell in cells) + "</tr>"

        columns = self.columns()
        rows = (line("td", [row.get(column) for column in columns]) for row in self)
        return f"<table>{line('th', columns)}{''.join(rows)}</table>"


def show(value: Any) -> str:
    """Return a value as text for a table."""
    if value is None:
        return "-"
    if isinstance(value, list):
        return ", ".join(map(show, value))
    if isinstance(value, float):
        return f"{value:,.0f}" if 1000 <= abs(value) < 1e15 else f"{value:.5g}"
    return f"{value:,}" if type(value) is int else str(value)


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean and the sample standard deviation, which is 0 for a single value."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0
