"""multifire compare: print finished runs as a table."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from multifire.cli.output import print_table


def add_parser(commands) -> None:
    """Add the command and its options to the parser."""
    parser = commands.add_parser("compare", help="print finished runs as a table: their differences and their results")
    parser.add_argument("folders", type=Path, nargs="+", metavar="RUN", help="run folder")
    parser.add_argument("--csv", type=Path, help="write the table to this file too")
    parser.set_defaults(run=compare)


def compare(args: argparse.Namespace) -> int:
    """Print the table of the runs."""
    return show_runs(args.folders, args.csv)


def show_runs(folders: Sequence[Path], csv: Path | None, summary: Path | None = None) -> int:
    """Print the table of the runs and their mean accuracy; write it to `csv` and, as JSON, to `summary`."""
    from multifire.experiments.compare import compare, write_csv
    from multifire.report.values import mean_and_deviation
    from multifire.utils.files import write_json

    rows = compare(folders)
    cells = [["-" if value is None else str(value) for value in row.values()] for row in rows]
    print_table(list(rows[0]), cells)
    mean, deviation = mean_and_deviation([row["test accuracy %"] for row in rows])
    print(f"test accuracy {mean:.2f} ± {deviation:.2f} % (mean and standard deviation of {len(rows)} runs)")
    if csv:
        write_csv(csv, rows)
        print(f"written to {csv}")
    if summary:
        write_json(summary, {"test accuracy %": {"mean": mean, "standard deviation": deviation}, "runs": rows})
        print(f"written to {summary}")
    return 0
