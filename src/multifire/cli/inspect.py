"""multifire inspect: check a file, and print its provenance."""

import argparse
from pathlib import Path

from multifire.cli.output import printable


def add_parser(commands) -> None:
    """Add the command and its options to the parser."""
    parser = commands.add_parser("inspect", help="check a checkpoint or exported file, and print where it came from")
    parser.add_argument("file", type=Path, metavar="FILE",
                        help="a run's checkpoint, an exported file or a `--to pretrained` folder")  # fmt: skip
    parser.set_defaults(run=inspect)


def inspect(args: argparse.Namespace) -> int:
    """Print what the file contains, and its provenance."""
    from multifire.export.inspection import inspect
    from multifire.export.provenance import describe

    content, provenance = inspect(args.file)
    print(printable(f"{args.file}: intact; {content}"))
    for name, text in describe(provenance):
        print(f"{name:>12}  {printable(text)}")
    return 0
