#!/usr/bin/env python3
"""Record training curves of cifar10-small with the CPU kernel and with the reference backend, for several seeds.

usage: python -m benchmarks.curves [--root data] [--seeds 0 1 2] [--epochs 3] [--limit 2000] [--out FOLDER]

Each run trains on LIMIT images. A fifth of the whole training set is held out for validation and evaluated after each
epoch. Only the first 500 images of the test set are used.

Writes curves.csv (one row for each epoch of each run) and curves.png. Prints for each epoch the mean difference between
the two backends with the same seed, and the mean difference between two seeds of the reference. docs/benchmarks.md
contains these results; its picture is a copy of curves.png in docs/images.
"""

import argparse
import contextlib
import io
import itertools
import json
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib as mpl

from benchmarks.tables import curves_apart, write_csv
from multifire import datasets
from multifire.config import TrainOptions, get_recipe
from multifire.training.loop import train
from multifire.utils.device import processor
from multifire.utils.files import write_atomic

RESULTS = Path(__file__).parent / "results"
BACKENDS = ("cpu", "reference")
COLUMNS = ("backend", "seed", "epoch", "train_loss", "train_accuracy", "validation_loss", "validation_accuracy",
           "processor")  # fmt: skip
TEST_IMAGES = 500


def train_curve(backend: str, seed: int, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Train once and return a row for each epoch."""
    cfg = get_recipe("cifar10-small")
    cfg = replace(
        cfg,
        backend=backend,
        seed=seed,
        data=replace(cfg.data, root=args.root, limit=args.limit, validation=0.2),
        optim=replace(cfg.optim, epochs=args.epochs),
    )
    with tempfile.TemporaryDirectory() as folder:
        train(cfg, Path(folder) / "run", TrainOptions(analyze_every=0))
        lines = (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()
    metric_names = {name for name in COLUMNS if name.startswith(("train", "validation"))}
    run = {"backend": backend, "seed": seed, "processor": processor()}
    epochs = enumerate(map(json.loads, lines), 1)
    return [run | {"epoch": epoch} | {name: metrics[name] for name in metric_names} for epoch, metrics in epochs]


def shorten_test_sets() -> None:
    """Limit the test set of every data set that is loaded from now on to TEST_IMAGES images, to save time."""
    load = datasets.load

    def load_shortened(*args: Any) -> datasets.Dataset:
        data = load(*args)
        return replace(data, test=datasets.take(data.test, TEST_IMAGES, 0))

    datasets.load = load_shortened


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw train loss and validation accuracy by epoch: solid lines for the CPU kernel, dotted for the reference."""
    mpl.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
    for axes, metric in zip(panels, ("train_loss", "validation_accuracy"), strict=True):
        for (backend, seed), group in itertools.groupby(rows, lambda row: (row["backend"], row["seed"])):
            run = list(group)
            style = {"color": f"C{seed}", "linestyle": "-" if backend == "cpu" else ":", "marker": "."}
            epochs, values = [row["epoch"] for row in run], [row[metric] for row in run]
            axes.plot(epochs, values, label=f"{backend}, seed {seed}", **style)
        axes.set(xlabel="epoch", ylabel=metric.replace("_", " "))
        axes.xaxis.get_major_locator().set_params(integer=True)
    panels[0].legend(fontsize="small")
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=120)
    write_atomic(path, png.getvalue())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", default="data", help="folder of the data sets (default: data)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="two or more seeds (default: 0 1 2)")
    parser.add_argument("--epochs", type=int, default=3, help="epochs of each run (default: 3)")
    parser.add_argument("--limit", type=int, default=2000, help="number of training images (default: 2000)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for curves.csv and curves.png")
    args = parser.parse_args()
    if len(args.seeds) < 2:
        parser.error(f"--seeds is {args.seeds}, expected two or more, because two seeds are compared with each other")
    shorten_test_sets()
    rows = []
    for backend in BACKENDS:
        for seed in args.seeds:
            with contextlib.redirect_stderr(io.StringIO()):
                rows += train_curve(backend, seed, args)
            print(f"{backend}, seed {seed}: {rows[-1]}", flush=True)
            write_csv(args.out / "curves.csv", COLUMNS, rows)
    draw(rows, args.out / "curves.png")
    print(curves_apart(rows))


if __name__ == "__main__":
    main()
