"""multifire sweep: train a recipe many times with varied fields."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import tyro

from multifire.cli.data import prepare_with_bar
from multifire.cli.output import print_table
from multifire.cli.overrides import asks_for_help, parse_overrides, parse_seeds, recipe_of
from multifire.config import RECIPES, RunConfig
from multifire.utils.errors import unknown
from multifire.utils.progress import print_line

SOME_RUNS_FAILED = 1
USAGE_ERROR = 2

HELP = """usage: multifire sweep KIND RECIPE [--overrides] [--vary FIELD=V1,V2] [--seeds 0,1,2] [--jobs N]

Train a recipe many times, side by side, and write a table and a report of all runs. The same command continues a
sweep that was stopped, and keeps its finished runs.
  ablation  plain and DS blocks, each with K = 1, 2, 3 firing levels
  depth     plain and DS blocks, each at depth 14, 20, 32, 44, 68
  grid      every combination of the values that --vary lists
Recipes: {recipes},
or a recipe file such as my_recipe.py.

`multifire sweep KIND RECIPE --help` lists every override and option, for example
  multifire sweep ablation cifar10-small --seeds 0,1,2 --jobs 2 --budget 4h
  multifire sweep grid digits --vary model.levels=1,2,3 --vary optim.lr=0.1,0.05 --budget '3 epochs'"""


@dataclass(frozen=True)
class SweepArguments(RunConfig):
    """Overrides of the recipe, and the options of the command."""

    recipe: Annotated[str, tyro.conf.Suppress] = ""
    code: Annotated[str, tyro.conf.Suppress] = ""
    code_sha256: Annotated[str, tyro.conf.Suppress] = ""
    vary: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """A field and its values, such as model.levels=1,2,3. You can give this option several times."""
    seeds: str = "0"
    """Train every combination with each of these seeds, such as 0,1,2."""
    jobs: int = 1
    """Number of runs at a time, which share the cores."""
    budget: str | None = None
    """Train fewer epochs: so many that all runs fit a time (30m, 4h), or a number per run ('5 epochs')."""
    out: Path | None = None
    """Folder of the runs; None: runs/KIND-RECIPE."""
    dry_run: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """List the runs, and write nothing."""


def add_parser(commands) -> None:
    """Add the command to the help text; `main` parses its options."""
    commands.add_parser("sweep", help="train a recipe many times with varied fields, and make a table", add_help=False)


def main(argv: Sequence[str]) -> int:
    """Carry out the sweep of the kind and the recipe that the first two arguments name."""
    if len(argv) < 2 or asks_for_help(argv):
        print(HELP.format(recipes=", ".join(RECIPES)))
        return 0 if asks_for_help(argv) else USAGE_ERROR
    from multifire.experiments.sweep import sweep
    from multifire.experiments.sweep_cells import KINDS, make_cells, variations

    kind, args = argv[0], argv[1:]
    if kind not in KINDS:
        raise unknown("sweep", kind, KINDS)
    recipe = recipe_of(args, f"sweep {kind}")
    cfg, options = parse_overrides(recipe, args[1:], f"sweep {kind}", SweepArguments)
    if options.jobs < 1:
        raise ValueError(f"jobs is {options.jobs}, expected at least 1")
    out = options.out or Path("runs") / f"{kind}-{cfg.recipe}"
    fields = variations(kind, cfg, options.vary)
    cells = make_cells(recipe, cfg, fields, parse_seeds(options.seeds), out, partial(_override, kind))
    if options.dry_run:
        for cell in cells:
            print(cell.name)
        print(f"{len(cells)} runs; nothing was written")
        return 0
    _prepare_data(cells)
    outcomes, stopped = sweep(cells, out, budget=options.budget, jobs=options.jobs, cost=_cost, say=print_line)
    return _print_outcomes(outcomes, stopped, out)


def _override(kind: str, cfg: RunConfig, args: Sequence[str]) -> RunConfig:
    return parse_overrides(cfg, args, f"sweep {kind}", SweepArguments)[0]


def _prepare_data(cells: Sequence) -> None:
    """Prepare each data set now, so that several runs do not prepare it at the same time."""
    from multifire.datasets import needs_preparation

    for data in {repr(cell.cfg.data): cell.cfg.data for cell in cells}.values():
        if needs_preparation(data.name):
            prepare_with_bar(data)


def _cost(cfg: RunConfig) -> tuple[float, float]:
    from multifire.experiments.plan import plan

    estimate = plan(cfg)
    return estimate.start_seconds, estimate.epoch_seconds


def _print_outcomes(outcomes: Sequence, stopped: int, out: Path) -> int:
    """Print the table of the finished runs and the errors of the failed ones; return the exit code."""
    from multifire.experiments.sweep_table import write_tables

    count = sum(outcome.error is None for outcome in outcomes)
    if count:
        head, rows = write_tables(outcomes, out, with_report=not stopped)
        print_table(head, rows, text_columns=len(outcomes[0].cell.values))
        files = f"table.md, table.csv, table.tex{', report.html, figures' * (not stopped)}"
        print_line(f"runs finished: {count}; {files} in {out}")
    if stopped:
        print(f"multifire: stopped; the same command continues it in {out}", file=sys.stderr)
        return 128 + stopped
    failed = [outcome for outcome in outcomes if outcome.error]
    for outcome in failed:
        print(f"multifire: failed: {outcome.cell.name}: {outcome.error}", file=sys.stderr)
    return SOME_RUNS_FAILED if failed else 0
