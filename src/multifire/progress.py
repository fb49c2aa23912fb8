"""Progress of long work: a rich bar on a terminal, plain lines elsewhere."""

import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

PLAIN_LINE_SECONDS = 15.0
CONSOLE = Console()
"""The one that everything a person reads goes through: a second one would write across a bar that is on the screen."""


class Bar:
    """How far work of `total` units is, with a line of figures: `with Bar(...) as bar: bar.update(done, "...")`."""

    def __init__(self, title: str, total: int, done: int = 0):
        self._title, self._total, self._start, self._done = title, total, done, done
        self._began = self._last_line = time.monotonic()
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
        """Show that `done` units are done; `title` replaces the bar's."""
        self._title = title or self._title
        if self._rich:
            self._rich.update(self._task, completed=done, figures=figures, description=self._title)
        elif time.monotonic() - self._last_line >= PLAIN_LINE_SECONDS:
            self._last_line = time.monotonic()
            left = (self._last_line - self._began) / max(done - self._start, 1) * (self._total - done)
            self.say(f"{self._title} {100 * done / self._total:3.0f} % {figures} {format_seconds(left)} left")

    def advance(self) -> None:
        """One unit more is done."""
        self._done += 1
        self.update(self._done, "")

    def say(self, line: str) -> None:
        """A line that stays, above the bar."""
        CONSOLE.print(line, highlight=False, markup=False, soft_wrap=True)


def format_seconds(seconds: float) -> str:
    """Hours, minutes and seconds as h:mm:ss."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"
