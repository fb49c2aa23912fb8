"""multifire report: write an HTML page about runs."""

import argparse
from pathlib import Path

from multifire.cli.options import add_code, add_root, add_run
from multifire.cli.output import print_lines
from multifire.utils.progress import Bar


def add_parser(commands) -> None:
    """Add the command and its options to the parser."""
    parser = commands.add_parser(
        "report", help="write an HTML page about runs, and every chart as a picture and as CSV"
    )
    add_run(parser, several=True)
    add_code(parser)
    parser.add_argument(
        "--out", type=Path, help="file of the page (default: RUN/report.html; several runs: report.html)"
    )
    parser.add_argument("--figures", type=Path, metavar="DIR", help="write each chart as PNG, SVG and CSV too")
    add_root(parser)
    parser.add_argument("--no-measure", action="store_true",
                        help="show recorded figures only; do not read checkpoints or data")  # fmt: skip
    parser.set_defaults(run=report)


def report(args: argparse.Namespace) -> int:
    """Write the page, and print what is missing in it."""
    from multifire.report import write_report

    out = args.out or (args.folders[0] if len(args.folders) == 1 else Path()) / "report.html"
    with Bar("reading the runs", len(args.folders)) as bar:
        notes = write_report(args.folders, out, args.figures, not args.no_measure, args.root, bar.advance)
    print_lines(f"missing: {note}" for note in notes)
    print(f"written to {out}" + (f", figures to {args.figures}" if args.figures else ""))
    return 0
