"""Print tables that fit the terminal, plain lines, and text from files."""

from collections.abc import Iterable, Sequence

from rich.box import SIMPLE_HEAD
from rich.cells import cell_len
from rich.markup import escape
from rich.table import Table

from multifire.utils.progress import CONSOLE, print_line

COLUMN_GAP = 2
"""Spaces between two columns of a table."""


def print_lines(lines: Iterable[str]) -> None:
    """Print each line with `print_line`."""
    for line in lines:
        print_line(line)


def print_table(
    head: Sequence[str], rows: Iterable[Sequence[str]], *, title: str = "", text_columns: int = 1, total: bool = False
) -> None:
    """Print a table; if it is wider than the terminal, print each cell on a line of its own.

    Args:
        head: names of the columns.
        rows: cells as text.
        title: line above the table.
        text_columns: number of leading columns that hold text and are aligned to the left; the others hold numbers.
        total: True if the last row is a total, which a line separates from the others.
    """
    rows = [list(row) for row in rows]
    if title:
        print_lines([title])
    if _width(head, rows) > CONSOLE.width:
        _print_blocks(head, rows)
        return
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, COLUMN_GAP - 1, 0, 0), show_edge=False)
    for index, name in enumerate(head):
        table.add_column(escape(name), justify="left" if index < text_columns else "right", no_wrap=True)
    for number, row in enumerate(rows):
        if total and number == len(rows) - 1:
            table.add_section()
        table.add_row(*map(escape, row))
    CONSOLE.print(table)


def _width(head: Sequence[str], rows: Sequence[Sequence[str]]) -> int:
    """Return the width of the table in characters."""
    longest = [max(cell_len(row[index]) for row in [head, *rows]) for index in range(len(head))]
    return sum(longest) + COLUMN_GAP * (len(head) - 1)


def _print_blocks(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print each row as lines of name and value, for a terminal that is too narrow for the table."""
    widest = max(map(len, head))
    for row in rows:
        print_lines(f"{name:<{widest}}  {cell}" for name, cell in zip(head, row, strict=True))
        CONSOLE.print()


def printable(text: str) -> str:
    """Return text from a file with its control characters escaped, since a terminal would execute them."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
