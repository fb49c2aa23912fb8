"""Options that several commands share."""

import argparse
from pathlib import Path


def add_checkpoint(parser: argparse.ArgumentParser) -> None:
    """Add --checkpoint."""
    parser.add_argument("--checkpoint", choices=("best", "last"), metavar="checkpoint",
                        help="best or last (default: the one whose accuracy summary.json holds)")  # fmt: skip


def add_code(parser: argparse.ArgumentParser) -> None:
    """Add --code."""
    parser.add_argument("--code", type=Path, help="Python file that registers what the run needs; this file is run")


def add_device(parser: argparse.ArgumentParser) -> None:
    """Add --device."""
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")


def add_root(parser: argparse.ArgumentParser) -> None:
    """Add --root for a command that reads the data of a run."""
    parser.add_argument("--root", help="folder of the data sets (default: the run's)")


def add_data_root(parser: argparse.ArgumentParser) -> None:
    """Add --root for a command about data sets."""
    parser.add_argument("--root", type=Path, default=Path("data"), help="folder of the data sets (default: data)")
