"""multifire bench: time a recipe's network beside its convolutions alone."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from multifire.cli.output import print_lines, print_table
from multifire.cli.overrides import asks_for_help, parse_overrides, recipe_of
from multifire.config import RECIPES, RunConfig
from multifire.utils.progress import Bar

HELP = """usage: multifire bench RECIPE [--overrides] [--runs N] [--out FILE]

Time a training step and an evaluation of a recipe's network on random images, and the same for its convolutions
alone; measure the memory that a step needs. Recipes: {recipes}.

`multifire bench RECIPE --help` lists every override with the recipe's value, for example
  multifire bench cifar10 --optim.batch-size 16 --precision bf16"""


@dataclass(frozen=True)
class BenchArguments(RunConfig):
    """Overrides of the recipe, and the options of the command."""

    recipe: Annotated[str, tyro.conf.Suppress] = ""
    code: Annotated[str, tyro.conf.Suppress] = ""
    code_sha256: Annotated[str, tyro.conf.Suppress] = ""
    runs: int = 7
    """How often each measurement is repeated."""
    out: Path | None = None
    """JSON file to write the figures to; None: bench-RECIPE.json."""
    reference: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Time the reference implementation in fp32 too."""


def add_parser(commands) -> None:
    """Add the command to the help text; `main` parses its options."""
    commands.add_parser("bench", help="time a recipe's network beside its convolutions alone", add_help=False)


def main(argv: Sequence[str]) -> int:
    """Measure the recipe that the first argument names."""
    if asks_for_help(argv):
        print(HELP.format(recipes=", ".join(RECIPES)))
        return 0
    cfg, options = parse_overrides(recipe_of(argv, "bench"), argv[1:], "bench", BenchArguments)
    if options.runs < 1:
        raise ValueError(f"runs is {options.runs}, expected at least 1")
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else torch's profiler prints; torch reads it when imported
    from multifire.experiments.bench import bench
    from multifire.utils.files import write_json

    with Bar("measuring", 2 * (options.runs + 2)) as bar:
        figures = bench(cfg, options.runs, bar.advance, options.reference)
    path = options.out or Path(f"bench-{cfg.recipe}.json")
    write_json(path, figures)
    print_figures(figures)
    print(f"written to {path}")
    return 0


def print_figures(figures: dict[str, Any]) -> None:
    """Print the figures that `multifire.experiments.bench.bench` returned."""
    batch, machine = figures["batch_size"], figures["machine"]
    title = f"{figures['model']}, width {figures['width']}, K = {figures['levels']}, {figures['precision']}"
    rows = []
    for name, timing in figures["timings"].items():
        for network, seconds in timing.items():
            median, low, high = (1e3 * seconds[key] / batch for key in ("median", "fastest", "slowest"))
            rate, ratio = f"{1e3 / median:,.1f}", f"{seconds['ratio']:.3f}"
            rows.append([f"{name}, {network}", f"{median:.2f}", f"{low:.2f}-{high:.2f}", rate, ratio])
    head = ["", "ms/image", "range", "images/s", "× convs"]
    print_table(head, rows, title=f"{title}; [T, N, C, H, W] = {figures['input [T, N, C, H, W]']}")
    fractions = ", ".join(f"{kind} {100 * fraction:.0f} %" for kind, fraction in figures["share_of_a_step"].items())
    kept = ", ".join(f"{kind} {size / batch / 1e6:.2f}" for kind, size in figures["kept_bytes"].items())
    peak = figures["peak_bytes"]
    memory = "unknown" if peak is None else f"{peak / 1e6:,.0f} MB, {peak / batch / 1e6:.1f} MB/image"
    print_lines([
        "× convs: time divided by the time of the convolutions alone",
        f"time of a training step: {fractions}",
        f"peak memory of a training step, without the interpreter's: {memory}",
        f"kept for the backward pass: {figures['kept_bytes_per_neuron_and_step']:.2f} bytes per neuron and time step; "
        f"in MB/image: {kept}",
        f"{machine['processor']}, {machine['threads']} threads, torch {machine['torch']}, "
        f"backends {', '.join(figures['backends'])}",
    ])  # fmt: skip
