#!/usr/bin/env python3
"""Training curves of cifar10-small on the fused kernel and on the reference, with several seeds.

usage: python -m benchmarks.curves [--root data] [--seeds 0 1 2] [--epochs 3] [--limit 2000] [--out FOLDER]

`limit` images are trained on; a fifth of the whole training set is held out and scored after each epoch; of the test
set the first 500 images are kept. Writes curves.csv (every epoch of every run) and curves.png, and prints for each
epoch how far the backends are apart at the same seed, beside how far two seeds of the reference are. docs/benchmarks.md
shows them; its picture is a copy in docs/images.
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

from benchmarks.results import curves_apart, write_csv
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


def curve(backend: str, seed: int, args: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each epoch of one run."""
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
    names = {name for name in COLUMNS if name.startswith(("train", "validation"))}
    about = {"backend": backend, "seed": seed, "processor": processor()}
    return [about | {"epoch": at} | {n: json.loads(line)[n] for n in names} for at, line in enumerate(lines, 1)]


def cut_test_set() -> None:
    """Let every data set that is loaded from now on have a short test set."""
    load = datasets.load

    def loaded(*args: Any) -> datasets.Dataset:
        data = load(*args)
        return replace(data, test=datasets.take(data.test, TEST_IMAGES, 0))

    datasets.load = loaded


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    mpl.use("Agg")
    from matplotlib import pyplot

    figure, sides = pyplot.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
    for axes, what in zip(sides, ("train_loss", "validation_accuracy"), strict=True):
        for (backend, seed), run in itertools.groupby(rows, lambda row: (row["backend"], row["seed"])):
            of_run = list(run)
            style = {"color": f"C{seed}", "linestyle": "-" if backend == "cpu" else ":", "marker": "."}
            axes.plot([r["epoch"] for r in of_run], [r[what] for r in of_run], label=f"{backend}, seed {seed}", **style)
        axes.set(xlabel="epoch", ylabel=what.replace("_", " "))
        axes.xaxis.get_major_locator().set_params(integer=True)
    sides[0].legend(fontsize="small")
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=120)
    write_atomic(path, drawn.getvalue())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", default="data")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--limit", type=int, default=2000)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    if len(args.seeds) < 2:
        parser.error(f"--seeds is {args.seeds}, expected two or more: their spread is the measure")
    cut_test_set()
    rows = []
    for backend in BACKENDS:
        for seed in args.seeds:
            with contextlib.redirect_stderr(io.StringIO()):
                rows += curve(backend, seed, args)
            print(f"{backend}, seed {seed}: {rows[-1]}", flush=True)
            write_csv(args.out / "curves.csv", COLUMNS, rows)
    draw(rows, args.out / "curves.png")
    print(curves_apart(rows))


if __name__ == "__main__":
    main()
