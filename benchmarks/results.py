#!/usr/bin/env python3
"""Train the networks of docs/results.md, within a given number of minutes; go on where an earlier call has stopped.

usage: python benchmarks/results.py --minutes M --state FOLDER [--root DATA] [--only NAME ...] [--out FOLDER]
       python benchmarks/results.py --list

The trainings run in the order of their importance. A stopped one continues from its run folder in --state, which may
come from another machine. After each epoch its row stands in trainings.csv in the folder --out. The machine needs
torch (on a GPU with Triton), NumPy, safetensors and this working tree.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from benchmarks.gpu_parts.bare import prepare_imports  # noqa: E402

EARLY = 10.0
"""Seconds that are left for the last checkpoint."""


def main(argv: Sequence[str] | None = None) -> int:
    start = time.monotonic()
    parser = argparse.ArgumentParser(prog="benchmarks/results.py", description="See the head of the file.")
    wanted = parser.add_mutually_exclusive_group(required=True)
    wanted.add_argument("--minutes", type=float, help="stop after this time")
    wanted.add_argument("--list", action="store_true", help="print the trainings, in order")
    parser.add_argument("--state", type=Path, default=ROOT / "runs" / "trainings", help="folder of the runs")
    parser.add_argument("--root", default="data", help="folder of the data sets (default: data)")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these trainings, in this order")
    out_help = "folder of trainings.csv (default: benchmarks/results, with --tiny STATE)"
    parser.add_argument("--out", type=Path, help=out_help)
    parser.add_argument("--tiny", action="store_true", help="a few images and epochs of narrow networks, to try it")
    args = parser.parse_args(argv)
    prepare_imports(ROOT / "build" / "wheels")
    from benchmarks.trainings import chosen, train_in_turn  # imports multifire, which is found from here on

    try:
        trainings = chosen(args.only, tiny=args.tiny)
    except ValueError as error:
        parser.error(str(error))
    if args.list:
        print("\n".join(f"{training.name:18}{training.about}" for training in trainings))
    else:
        deadline = start + 60 * args.minutes - EARLY
        out = args.out or (args.state if args.tiny else ROOT / "benchmarks" / "results")
        train_in_turn(trainings, args.state, args.root, out / "trainings.csv", deadline)
    return 0


if __name__ == "__main__":
    sys.exit(main())
