"""Write the table of a sweep: mean and standard deviation over seeds, as CSV, Markdown and LaTeX."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from multifire.experiments.sweep_cells import Outcome
from multifire.report import write_report
from multifire.report.draw import csv_text
from multifire.report.run import Run
from multifire.report.values import mean_and_deviation, show
from multifire.utils.files import write_atomic

COLUMNS: dict[str, tuple[Callable[[Run], float | None], float]] = {
    "test accuracy %": (lambda run: run.summary.get("test_accuracy"), 100),
    "dormant %": (lambda run: run.headline.get("dormant"), 100),
    "dormant, first layers %": (lambda run: first_layers(run, "dormant"), 100),
    "gradient, last over first": (lambda run: run.headline.get("gradient", {}).get("activation_ratio"), 1),
    "energy µJ": (lambda run: run.headline.get("energy", {}).get("snn_pj"), 1e-6),
}
"""Name of a column -> the function that returns its figure of a run, and the factor that converts it to the unit."""
FIRST_LAYERS = 3


def write_tables(outcomes: Sequence[Outcome], out: Path, with_report: bool) -> tuple[list[str], list[list[str]]]:
    """Write table.csv, table.md, table.tex and, if asked for, a report of the finished runs.

    Returns:
        Head and rows of the table as text.
    """
    finished = [outcome.cell.folder for outcome in outcomes if outcome.error is None]
    if with_report:
        # Written before the table is, because it analyses runs that have no analysis.
        write_report(finished, out / "report.html", out / "figures")
    rows = table_rows(outcomes)
    names, lines = format_rows(rows)
    markdown = ["| " + " | ".join(line) + " |" for line in [names, ["---"] * len(names), *lines]]
    write_atomic(out / "table.csv", csv_text(rows).encode())
    write_atomic(out / "table.md", ("\n".join(markdown) + "\n").encode())
    write_atomic(out / "table.tex", latex(names, lines).encode())
    return names, lines


def first_layers(run: Run, name: str) -> float | None:
    """Return the mean of a figure over the first FIRST_LAYERS layers of neurons."""
    figures = [layer[name] for layer in run.headline.get("layers", [])[:FIRST_LAYERS] if layer[name] is not None]
    return sum(figures) / len(figures) if figures else None


def table_rows(outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    """Return a row for each combination of values: number of finished runs, mean and deviation of each figure."""
    runs_of: dict[tuple[str, ...], list[Run]] = {}
    values: dict[tuple[str, ...], dict[str, str]] = {}
    for outcome in outcomes:
        key = tuple(outcome.cell.values.values())
        values[key] = outcome.cell.values
        runs_of.setdefault(key, []).extend([] if outcome.error else [Run(outcome.cell.folder)])
    rows = []
    for key, runs in runs_of.items():
        row: dict[str, Any] = {**values[key], "runs": len(runs)}
        for column, (measure, factor) in COLUMNS.items():
            known = [factor * value for run in runs if (value := measure(run)) is not None]
            mean, deviation = mean_and_deviation(known) if known else (None, None)
            row |= {column: mean, f"{column} std": deviation if len(known) > 1 else None}
        rows.append(row)
    return rows


def format_rows(rows: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Return head and cells as text, with mean ± deviation; leave out columns without a figure."""
    measures = [column for column in COLUMNS if any(row[column] is not None for row in rows)]
    fields = [name for name in rows[0] if name not in COLUMNS and not name.endswith(" std")]
    lines = [[show(row[name]) for name in fields] + [_spread(row, column) for column in measures] for row in rows]
    return fields + measures, lines


def _spread(row: dict[str, Any], column: str) -> str:
    mean, deviation = row[column], row[f"{column} std"]
    if mean is None:
        return "-"
    return f"{mean:.2f}" if deviation is None else f"{mean:.2f} ± {deviation:.2f}"


def latex(names: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Return the table as a LaTeX tabular with booktabs rules."""
    rows = [r"\begin{tabular}{" + "l" + "r" * (len(names) - 1) + "}", r"\toprule"]
    rows += [_latex_line(names), r"\midrule", *map(_latex_line, lines), r"\bottomrule", r"\end{tabular}"]
    return "\n".join(rows) + "\n"


def _latex_line(cells: Sequence[str]) -> str:
    special = {"\\": r"\textbackslash{}", "±": r"$\pm$", "µ": r"\textmu{}", **{c: f"\\{c}" for c in "&%$#_{}"}}
    return " & ".join("".join(special.get(c, c) for c in cell) for cell in cells) + r" \\"
