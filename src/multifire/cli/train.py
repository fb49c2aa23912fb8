"""multifire train: train a recipe, with overrides of its values."""

import dataclasses
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from multifire.cli.compare import show_runs
from multifire.cli.data import prepare_with_bar
from multifire.cli.output import print_lines
from multifire.cli.overrides import asks_for_help, parse_overrides, parse_seeds, recipe_of
from multifire.config import RECIPES, RunConfig, TrainOptions
from multifire.utils.memory import keep_freed_memory
from multifire.utils.progress import CONSOLE, format_seconds

HELP = """usage: multifire train RECIPE [--overrides] [--out FOLDER] [--resume [auto]]

Train a recipe: {recipes}.

`multifire train RECIPE --help` lists every override with the recipe's value, for example
  multifire train digits --optim.epochs 3 --model.levels 1 --out runs/lif
  multifire train digits --out runs/lif --optim.epochs 3 --model.levels 1 --resume"""


@dataclass(frozen=True)
class TrainArguments(TrainOptions, RunConfig):
    """Overrides of the recipe, and the options of the command."""

    recipe: Annotated[str, tyro.conf.Suppress] = ""
    code: Annotated[str, tyro.conf.Suppress] = ""
    code_sha256: Annotated[str, tyro.conf.Suppress] = ""
    out: Path | None = None
    """Run folder; None: runs/RECIPE."""
    seeds: str | None = None
    """Train one run with each of these seeds, such as 0,1,2; print mean and standard deviation of the accuracy."""
    dry_run: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Measure a few training steps and print the time, memory and disk space of the run, but write nothing."""

    def __post_init__(self):
        RunConfig.__post_init__(self)
        TrainOptions.__post_init__(self)


def add_parser(commands) -> None:
    """Add the command to the help text; `main` parses its options."""
    commands.add_parser("train", help="train a recipe, with overrides", add_help=False)


def main(argv: Sequence[str]) -> int:
    """Train the recipe that the first argument names."""
    if asks_for_help(argv):
        print(HELP.format(recipes=", ".join(RECIPES)))
        return 0
    cfg, arguments = parse_overrides(recipe_of(argv, "train"), argv[1:], "train", TrainArguments)
    if arguments.dry_run:
        return _print_plan(cfg)
    options = TrainOptions(**{field.name: getattr(arguments, field.name) for field in dataclasses.fields(TrainOptions)})
    out = arguments.out or Path("runs") / cfg.recipe
    if arguments.seeds:
        numbers = parse_seeds(arguments.seeds)
        return until_stopped(lambda: _train_seeds(cfg, out, options, numbers))
    return until_stopped(lambda: run_training(cfg, out, options))


def until_stopped(run: Callable[[], int]) -> int:
    """Call `run`; if a signal or --max-time stops the training, print why and return its exit code."""
    from multifire.training.signals import Interrupted

    try:
        return run()
    except Interrupted as stopped:
        if not CONSOLE.quiet:  # of several processes, only one prints
            print(f"multifire: {stopped}", file=sys.stderr)
        return stopped.exit_code


def run_training(cfg: RunConfig, out: Path, options: TrainOptions) -> int:
    """Prepare the data, train, print the result, and suggest the next command."""
    from multifire.datasets import describe, needs_preparation
    from multifire.training.loop import train

    if needs_preparation(cfg.data.name):
        prepare_with_bar(cfg.data)
    info = describe(cfg.data)
    keep_freed_memory(after_first_step=True)
    summary = train(cfg, out, options)
    if CONSOLE.quiet:
        return 0
    seconds, rate = format_seconds(summary["train_seconds"]), summary["images_per_second"]
    print(
        f"held-out accuracy {100 * summary['test_accuracy']:.2f} % ({summary['test_accuracy_of']} checkpoint), "
        f"trained in {seconds}, {rate:,.0f} {'samples' if info.events else 'images'}/s"
    )
    if info.simulated:
        print("the events were simulated from images, not recorded with a camera")
    print(f"next: multifire report {out}")
    return 0


def _train_seeds(cfg: RunConfig, out: Path, options: TrainOptions, seeds: Sequence[int]) -> int:
    """Train one run for each seed, each in its own folder, and print their table."""
    if options.resume == "yes":  # runs of later seeds do not exist yet
        options = dataclasses.replace(options, resume="auto")
    folders = [out / f"seed-{seed}" for seed in seeds]
    for seed, folder in zip(seeds, folders, strict=True):
        run_training(dataclasses.replace(cfg, seed=seed), folder, options)
    return 0 if CONSOLE.quiet else show_runs(folders, out / "seeds.csv", out / "seeds.json")


def _print_plan(cfg: RunConfig) -> int:
    from multifire.experiments.plan import plan

    estimate = plan(cfg)
    peak = "unknown" if estimate.peak_bytes is None else f"{estimate.peak_bytes / 1e6:,.0f} MB"
    print_lines([
        f"{cfg.model.name}, {estimate.parameters:,} parameters; {cfg.data.name}, batches of {cfg.optim.batch_size}",
        f"training step: {1e3 * estimate.step_seconds:,.0f} ms; peak memory {peak} without the interpreter's, "
        f"of which {estimate.kept_bytes / 1e6:,.0f} MB are kept for the backward pass",
        f"epoch: {estimate.steps_per_epoch:,} steps, about {format_seconds(estimate.epoch_seconds)} with evaluation",
        f"run: {cfg.optim.epochs} epochs, about {format_seconds(estimate.run_seconds)}",
        f"checkpoint: {estimate.checkpoint_bytes / 1e6:,.1f} MB",
        "nothing was written",
    ])  # fmt: skip
    return 0
