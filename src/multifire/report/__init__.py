"""Reports about runs: an HTML page that opens anywhere, figures for a paper, and their numbers.

values.py   values from a stranger's files, checked and formatted
run_files.py  a run's folder, without trust in its content
run.py      a run with its charts, for a notebook
charts.py   the content of each chart, as numbers
draw.py     a chart for plotly, for matplotlib, as CSV
samples.py  predictions for single samples
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

MAX_RUNS_WITH_SAMPLES = 6
"""With more runs no samples are shown, since the page would be large and slow to make."""


def write_report(
    folders: Sequence[Path],
    out: Path,
    figures: Path | None = None,
    measure: bool = True,
    root: str | None = None,
    on_run: Callable[[], None] = lambda: None,
) -> list[str]:
    """Write a page about the runs, and optionally every chart with its numbers.

    Args:
        folders: the runs' folders.
        out: file of the page.
        figures: folder for the charts as PNG, SVG and CSV; None: not written.
        measure: run the networks whose checkpoint and data are available, to show samples and to make missing analyses.
        root: folder of the data sets (default: the runs').
        on_run: called after each run.

    Returns:
        Notes on what is missing.

    Raises:
        FileNotFoundError, ValueError: see Run; or a package is missing, and how to get it.
    """
    runs = [Run(folder) for folder in folders]
    samples: dict[int, Samples] = {}
    for index, run in enumerate(runs):
        if measure:
            found = _measure_run(run, root, with_samples=len(runs) <= MAX_RUNS_WITH_SAMPLES)
            if found:
                samples[index] = found
        on_run()
    labels = label_runs(runs)
    charts = [chart for name in CHARTS for chart in charts_of(name, runs)]
    write_atomic(out, page(Report(runs, labels, charts, samples)).encode())
    if figures:
        draw.save(charts, labels, figures)
    return [f"{run.name}: {note}" for run in runs for note in run.notes]


def _measure_run(run: Run, root: str | None, with_samples: bool) -> "Samples | None":
    """Return samples of a run, and analyse it if it has no analysis; an error becomes a note of the run."""
    if run.config is None or not (with_samples or not run.analysis):
        return None
    from multifire.report import samples

    try:
        model, cfg, data = samples.load(run.path, root)
        if not run.analysis:
            run.measured(samples.measure(model, cfg, data))
        return samples.look(model, cfg, data) if with_samples else None
    except (ValueError, OSError, RuntimeError, MemoryError, ArithmeticError) as error:
        run.notes.append(f"The network was not measured: {plain(error)}.")
        return None
