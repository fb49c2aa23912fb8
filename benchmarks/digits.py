"""`python -m benchmarks.digits`: train each neuron and network on the embedded digits, and stop and resume each.

Each network appends its row to digits.csv, so a stopped benchmark continues. docs/neurons.md has the table.
"""

import argparse
import contextlib
import signal
import tempfile
from pathlib import Path
from typing import Any

import torch

import multifire as mf
from benchmarks.tables import append, read_csv
from multifire.training.checkpoint import load_checkpoint
from multifire.training.signals import Interrupted
from multifire.utils.device import processor

RESULTS = Path(__file__).parent / "results"
SHARED = {"model.membranes": "shared"}
NETWORKS: dict[str, dict[str, Any]] = {
    "MLF, K = 3": {},
    "MLF, learned thresholds and decay": {"model.learn_thresholds": True, "model.learn_decay": True},
    "MSF, K = 3": {**SHARED, "model.reset": "any"},
    "I-LIF, thresholds 1/2, 3/2, 5/2": {**SHARED, "model.reset": "subtract", "model.thresholds": (0.5, 1.5, 2.5)},
    "ternary, threshold 1/2": {"model.levels": 1, "model.thresholds": (0.5,), "model.signed": True},
    "MLF, `vgg9`": {"model.name": "vgg9"},
    "MLF, membrane-shortcut blocks (`ms_resnet8`)": {"model.name": "ms_resnet8"},
    "LIF, spike-element-wise blocks (`sew_resnet8`)": {"model.name": "sew_resnet8", "model.levels": 1},
}
COLUMNS = ("network", "seed", "epochs", "accuracy", "best_accuracy", "resumed_to_the_same_bits", "processor", "torch")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.digits", description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--limit", type=int, help="train on this many images only")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the CSV file")
    args = parser.parse_args()
    finished = {(row["network"], row["seed"]) for row in read_csv(args.out / "digits.csv")}
    for name, options in NETWORKS.items():
        if (name, str(args.seed)) in finished:
            continue
        with tempfile.TemporaryDirectory() as folder:
            row = {"network": name, "seed": args.seed, **measure(options, args, Path(folder))}
        append(args.out / "digits.csv", COLUMNS, [row])
        print(f"{name}: {row['accuracy']:.4f}, the same bits: {row['resumed_to_the_same_bits']}", flush=True)


def measure(options: dict[str, Any], args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Train the network, then stop and resume two epochs of a few images; return the row of figures."""
    cfg = {**options, "seed": args.seed, "data.limit": args.limit}
    trained = train({**cfg, "optim.epochs": args.epochs}, folder / "trained")
    accuracies = [each["test_accuracy"] for each in trained.metrics]
    return {
        "epochs": args.epochs,
        "accuracy": accuracies[-1],
        "best_accuracy": max(accuracies),
        "resumed_to_the_same_bits": resumes({**cfg, "data.limit": 200, "optim.epochs": 2}, folder),
        "processor": processor(),
        "torch": torch.__version__,
    }


def resumes(cfg: dict[str, Any], folder: Path) -> bool:
    """Return True if a run that is stopped after its first epoch and resumed ends with the same tensors."""
    train(cfg, folder / "whole")
    with contextlib.suppress(Interrupted):
        train(cfg, folder / "stopped", on_epoch=stop_after_the_first)
    train(cfg, folder / "stopped", resume="yes")
    whole, stopped = (load_checkpoint(folder / name / "last.safetensors") for name in ("whole", "stopped"))
    return all(
        torch.equal(tensor, getattr(stopped, part)[name])
        for part in ("model", "optimizer")
        for name, tensor in getattr(whole, part).items()
    )


def stop_after_the_first(figures: dict[str, Any]) -> None:
    """Stop the run, as Ctrl-C does, when its first epoch has ended."""
    if figures["epoch"] == 0:
        signal.raise_signal(signal.SIGINT)


def train(cfg: dict[str, Any], out: Path, **options: Any) -> mf.Run:
    """Train the recipe `digits` with overrides."""
    return mf.train(mf.recipe("digits", **cfg), out, analyze_every=0, track=(), keep=1, **options)


if __name__ == "__main__":
    main()
