"""A run with its charts, for a notebook."""

import functools
import html
from collections.abc import Callable
from typing import Any

from multifire.report.charts import CHARTS, charts_of
from multifire.report.draw import plotly_figure
from multifire.report.run_files import RunFiles


class Run(RunFiles):
    """A run for a notebook: `config`, `summary`, `metrics`, `analysis`, `figures`, `notes`.

    Args:
        path: the run's folder.

    Raises:
        FileNotFoundError: no such folder, or no run in it.
        ValueError: none of the run's files can be read.
    """

    @property
    def figures(self) -> "Figures":
        return Figures(self)

    def _repr_html_(self) -> str:
        accuracy = "no accuracy yet" if self.accuracy is None else f"{100 * self.accuracy:.2f} %"
        notes = "".join(f"<li>{html.escape(note)}</li>" for note in self.notes)
        return (
            f"<h3>{html.escape(self.name)}</h3><p><b style='font-size: 1.6em'>{accuracy}</b> "
            f"{html.escape(self.describe())}, {len(self.metrics)} epochs</p><ul>{notes}</ul>"
        )


class Figures:
    """Charts of a run as plotly figures: `run.figures.accuracy()`; `dir(run.figures)` lists them.

    A chart with several parts, such as the membranes of each layer, shows one part at a time and has a menu.
    """

    def __init__(self, run: RunFiles):
        self._run = run

    def __dir__(self) -> list[str]:
        return list(CHARTS)

    def __getattr__(self, name: str) -> Callable[[], Any]:
        if name not in CHARTS:
            raise AttributeError(f"no chart {name!r}; there are {', '.join(CHARTS)}")
        return functools.partial(self._draw, name)

    def _draw(self, name: str) -> Any:
        charts = charts_of(name, [self._run])
        if not charts:
            raise ValueError(f"{self._run.path}: nothing to draw {name} of; {' '.join(self._run.notes)}")
        return plotly_figure(charts[0])
