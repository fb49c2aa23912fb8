"""`python -m benchmarks.penalty RECIPE`: train with growing spike penalties; measure accuracy, operations and time.

Each run appends its row to penalty.csv, so a stopped benchmark continues where it was. `--runs FOLDER` keeps the runs
in FOLDER/RECIPE-PENALTY-SEED. There a stopped training continues, and a finished one is only measured.
"""

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch

import multifire as mf
from benchmarks.claims import test_batch
from benchmarks.engine import load_engine, timed
from benchmarks.tables import append, read_csv
from multifire.analysis import measure_energy
from multifire.config import RunConfig
from multifire.export.int8 import export_run
from multifire.training.load_run import load_run
from multifire.utils.device import processor

RESULTS = Path(__file__).parent / "results"
PENALTIES = (0.0, 0.01, 0.03, 0.1, 0.3)
ISAS = ("avx2", "avx512_vnni", "")
"""Instruction sets of the engine; "": the one that it chooses."""
RUNS = 10
SETTING = ("recipe", "penalty", "seed", "epochs", "precision", "limit")
COLUMNS = (
    *SETTING, "accuracy", "best_accuracy", "synops",
    "engine_ms_avx2", "engine_ms_avx512_vnni", "engine_ms", "processor", "torch",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.penalty", description=__doc__)
    parser.add_argument("recipe")
    parser.add_argument("--root", default="data", help="folder of the data sets")
    parser.add_argument("--epochs", type=int, help="epochs of a run (default: the recipe's)")
    parser.add_argument("--limit", type=int, help="train on this many samples only")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="of the training")
    parser.add_argument("--penalties", type=float, nargs="+", default=PENALTIES)
    parser.add_argument("--runs", type=Path, help="folder that keeps the runs (default: none is kept)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of penalty.csv")
    args = parser.parse_args()
    finished = [{key: row[key] for key in SETTING} for row in read_csv(args.out / "penalty.csv")]
    for penalty in args.penalties:
        cfg = configuration(args, penalty)
        setting = setting_of(cfg)
        if setting in finished:
            print(f"{penalty}: measured before", flush=True)
            continue
        row = measure(cfg, args.runs)
        append(args.out / "penalty.csv", COLUMNS, [setting | row])
        print(f"{penalty}: accuracy {row['accuracy']:.4f}, {row['synops'] / 1e6:.2f} M operations", flush=True)


def configuration(args: argparse.Namespace, penalty: float) -> RunConfig:
    """Return the recipe with the options of the command."""
    epochs = {} if args.epochs is None else {"optim.epochs": args.epochs}
    return mf.recipe(
        args.recipe,
        **{"optim.spike_penalty": penalty, "seed": args.seed, "precision": args.precision},
        **{"data.root": args.root, "data.limit": args.limit},
        **epochs,
    )


def setting_of(cfg: RunConfig) -> dict[str, str]:
    """Return the columns that tell a run from others."""
    limit = "" if cfg.data.limit is None else str(cfg.data.limit)
    values = (cfg.recipe, f"{cfg.optim.spike_penalty:.6g}", str(cfg.seed), str(cfg.optim.epochs), cfg.precision, limit)
    return dict(zip(SETTING, values, strict=True))


def measure(cfg: RunConfig, runs: Path | None) -> dict[str, Any]:
    """Train a network, or continue its training in a folder of `runs`; return the figures of its row."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        out = (runs or folder) / f"{cfg.recipe}-{cfg.optim.spike_penalty:.6g}-{cfg.seed}"
        run = mf.train(cfg, out, resume="auto", analyze_every=0, track=(), keep=1)
        model = load_run(run.path, "last").model
        path = export_run(run.path, folder / "network.safetensors", "last").path
        x_TNCHW, y = test_batch(cfg)
        accuracies = [each["test_accuracy"] for each in run.metrics]
        return {
            "accuracy": accuracies[-1],
            "best_accuracy": max(accuracies),
            "synops": measure_energy(model, [(x_TNCHW, y)]).synops,
            **{f"engine_ms_{isa}".removesuffix("_"): engine_time(path, x_TNCHW, isa) for isa in ISAS},
            "processor": processor(),
            "torch": torch.__version__,
        }


def engine_time(path: Path, x_TNCHW: torch.Tensor, isa: str) -> float | None:
    """Return the mean time of the engine for a sample on one core, in milliseconds; None without that processor.

    Each sample's time is its fastest of RUNS, which other programs disturb least.
    """
    try:
        engine = load_engine(path, isa)
    except ValueError:
        return None
    samples = [x_TNCHW[:, i : i + 1].numpy() for i in range(x_TNCHW.shape[1])]
    engine.run(samples[0])  # allocates
    fastest = [min(timed(lambda: engine.run(sample)) for _ in range(RUNS)) for sample in samples]  # noqa: B023
    return 1e3 * statistics.fmean(fastest)


if __name__ == "__main__":
    main()
