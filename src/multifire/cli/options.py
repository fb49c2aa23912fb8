"""Options that several commands share."""

import argparse
from pathlib import Path


def add_run(parser: argparse.ArgumentParser, several: bool = False, files: bool = False) -> None:
    """Add the argument RUN; with `several`, one or more of them; with `files`, an exported file as well."""
    about = f"run folder{', exported int8 file' * files}, or a network that the package contains, such as digits"
    if several:
        parser.add_argument("folders", type=_run_folder, nargs="+", metavar="RUN", help=about)
    else:
        parser.add_argument("folder", type=_run_folder, metavar="RUN", help=about)


def _run_folder(text: str) -> Path:
    """Return the folder of a run; the run of a network of the package is copied into runs/ first."""
    from multifire.export.shipped import copy_shipped, shipped_names

    return Path(text) if Path(text).exists() or text not in shipped_names() else copy_shipped(text, Path("runs"))


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
