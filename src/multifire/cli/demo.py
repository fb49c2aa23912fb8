"""multifire demo: train on the embedded digits."""

import argparse
import time
from pathlib import Path

from multifire.cli.train import run_training, until_stopped
from multifire.config import TrainOptions, get_recipe


def add_parser(commands) -> None:
    """Add the command and its options to the parser."""
    parser = commands.add_parser("demo", help="train on the embedded digits; nothing to download, a few minutes")
    parser.add_argument("--out", type=Path, help="run folder (default: runs/demo-DATE-TIME)")
    parser.add_argument("--events", action="store_true", help="train on simulated event recordings of the digits")
    parser.set_defaults(run=demo)


def demo(args: argparse.Namespace) -> int:
    """Train the recipe `digits` or `digits-dvs`."""
    out = args.out or Path("runs") / time.strftime("demo-%Y%m%d-%H%M%S")
    cfg = get_recipe("digits-dvs" if args.events else "digits")
    return until_stopped(lambda: run_training(cfg, out, TrainOptions()))
