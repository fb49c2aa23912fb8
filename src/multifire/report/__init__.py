"""What came of runs, for people: a page that opens anywhere, figures for a paper, and their numbers.

run.py      a run's folder, read with suspicion
charts.py   what each chart shows, as numbers
draw.py     a chart for plotly, for matplotlib, as CSV
samples.py  what the network makes of single samples
page.py     the HTML file, with page.css and page.js
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from multifire.report import draw
from multifire.report.charts import CHARTS, charts_of, label_runs
from multifire.report.page import Report, page
from multifire.report.run import Run
from multifire.report.values import plain
from multifire.utils.files import write_atomic

if TYPE_CHECKING:
    from multifire.report.samples import Samples

__all__ = ["Run", "write_report"]

MOST_RUNS_LOOKED_INTO = 6
"""Of more runs than these, no samples are shown: a page of them all would be large, and slow to make."""


def write_report(
    folders: Sequence[Path],
    out: Path,
    figures: Path | None = None,
    measure: bool = True,
    root: str | None = None,
    on_run: Callable[[], None] = lambda: None,
) -> list[str]:
    """Write a page about the runs to `out` and, where asked for, every chart and its numbers into `figures`.

    With `measure`, a run's network is looked into where its checkpoint and its data are there: its samples, and its
    analysis where it has none yet, which is kept beside it. `on_run` is called after each run. Returns what is missing.

    Raises:
        FileNotFoundError, ValueError: see Run; or a package is missing, and how to get it.
    """
    runs = [Run(folder) for folder in folders]
    samples: dict[int, Samples] = {}
    for index, run in enumerate(runs):
        if measure:
            found = _look_into(run, root, with_samples=len(runs) <= MOST_RUNS_LOOKED_INTO)
            if found:
                samples[index] = found
        on_run()
    labels = label_runs(runs)
    charts = [chart for name in CHARTS for chart in charts_of(name, runs)]
    write_atomic(out, page(Report(runs, labels, charts, samples)).encode())
    if figures:
        draw.save(charts, labels, figures)
    return [f"{run.name}: {note}" for run in runs for note in run.notes]


def _look_into(run: Run, root: str | None, with_samples: bool) -> "Samples | None":
    """Samples of a run, and its analysis where there is none; what is in the way of them becomes a note of the run."""
    if run.config is None or not (with_samples or not run.analysis):
        return None
    from multifire.report import samples

    try:
        model, cfg, data = samples.load(run.path, root)
        if not run.analysis:
            run.measured(samples.measure(model, cfg, data))
        return samples.look(model, cfg, data) if with_samples else None
    except (ValueError, OSError, RuntimeError, MemoryError, ArithmeticError) as error:
        run.notes.append(f"The network was not looked into: {plain(error)}.")
        return None
