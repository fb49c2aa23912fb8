"""Printing that commands share: tables that fit the terminal, plain lines, text from files."""

from collections.abc import Iterable, Sequence

from rich.markup import escape
from rich.table import Table

from multifire.utils.progress import CONSOLE


def print_lines(lines: Iterable[str]) -> None:
    """Print lines as they are, without markup or colours; on a terminal, long ones wrap between words."""
    for line in lines:
        CONSOLE.print(line, highlight=False, markup=False, soft_wrap=not CONSOLE.is_terminal)


def print_table(
    head: Sequence[str], rows: Iterable[Sequence[str]], *, title: str = "", text_columns: int = 1, total: bool = False
) -> None:
    """Print a table that fits the terminal, or one row below another if it is too wide for that.

    Args:
        head: names of the columns.
        rows: cells as text.
        title: line above the table.
        text_columns: how many of the first columns hold text, aligned to the left; the others hold numbers.
        total: whether the last row is a total, set apart by a line.
    """
    rows = [list(row) for row in rows]
    if title:
        print_lines([title])
    if _width(head, rows) > CONSOLE.width:
        _print_blocks(head, rows)
        return
    table = Table(pad_edge=False)
    for index, name in enumerate(head):
        table.add_column(escape(name), justify="left" if index < text_columns else "right", no_wrap=True)
    for number, row in enumerate(rows):
        if total and number == len(rows) - 1:
            table.add_section()
        table.add_row(*map(escape, row))
    CONSOLE.print(table)


def _width(head: Sequence[str], rows: Sequence[Sequence[str]]) -> int:
    """Columns of the terminal that rich's table takes: the longest cell of each column, and borders."""
    cells = [max(len(row[index]) for row in [head, *rows]) for index in range(len(head))]
    return sum(cells) + 3 * (len(head) - 1) + 2


def _print_blocks(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print each row as lines of `name value`, for a terminal that is too narrow for a table."""
    widest = max(map(len, head))
    for row in rows:
        print_lines(f"{name:<{widest}}  {cell}" for name, cell in zip(head, row, strict=True))
        CONSOLE.print()


def printable(text: str) -> str:
    """Return text from a file with its control characters escaped: a terminal would obey them."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
