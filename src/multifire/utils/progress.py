"""Show progress: a bar on a terminal, plain lines elsewhere."""

import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

PLAIN_LINE_SECONDS = 15.0
CONSOLE = Console()
if CONSOLE.is_jupyter:  # lines of text: rich would make an element of the page of each
    CONSOLE = Console(force_jupyter=False, force_terminal=False)
"""The console for all output: a second one would write into a bar on the screen."""


class Bar:
    """Shows how many of `total` units of work are done: `with Bar("training", 100) as bar: bar.update(7, "loss 1")`."""

    def __init__(self, title: str, total: int, done: int = 0):
        self._title, self._total, self._done_at_start, self._done = title, total, done, done
        self._start = self._last_line = time.monotonic()
        self._rich = None
        if CONSOLE.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(None), TextColumn("{task.percentage:>3.0f} %"))
            figures = (TextColumn("{task.fields[figures]}"), TimeRemainingColumn())
            self._rich = Progress(*columns, *figures, console=CONSOLE, transient=True)
            self._task = self._rich.add_task(title, total=total, completed=done, figures="")

    def __enter__(self) -> Self:
        if self._rich:
            self._rich.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        if self._rich:
            self._rich.stop()

    def update(self, done: int, figures: str, title: str | None = None) -> None:
        """Show that `done` units are done, with `figures` beside the bar; `title` replaces the title of the bar."""
        self._title = title or self._title
        if self._rich:
            self._rich.update(self._task, completed=done, figures=figures, description=self._title)
        elif time.monotonic() - self._last_line >= PLAIN_LINE_SECONDS:
            self._last_line = time.monotonic()
            seconds_per_unit = (self._last_line - self._start) / max(done - self._done_at_start, 1)
            remaining = format_seconds(seconds_per_unit * (self._total - done))
            self.say(f"{self._title} {100 * done / self._total:3.0f} % {figures} {remaining} left")

    def advance(self) -> None:
        """Show that one more unit is done."""
        self._done += 1
        self.update(self._done, "")

    def say(self, line: str) -> None:
        """Print a line above the bar."""
        print_line(line)


def print_line(line: str) -> None:
    """Print a line without markup or colours. A terminal wraps a long line between words; a file gets it unbroken."""
    CONSOLE.print(line, highlight=False, markup=False, soft_wrap=not CONSOLE.is_terminal)


def format_seconds(seconds: float) -> str:
    """Return a time as text: h:mm:ss."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"
