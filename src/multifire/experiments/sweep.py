"""Many runs that differ in a few fields: which there are, their processes side by side, and the table of them all."""

import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from multifire.config import RunConfig, get_recipe
from multifire.config.architecture import parse_model_name
from multifire.config.json_format import flatten_config
from multifire.config.schema import parse_duration
from multifire.report import write_report
from multifire.report.draw import csv_text
from multifire.report.run import Run
from multifire.report.values import mean_and_deviation, show
from multifire.training.run_folder import RunFolder
from multifire.training.signals import catch_signals
from multifire.utils.files import lock_folder, write_atomic, write_json
from multifire.utils.progress import Bar, format_seconds

LEVELS = (1, 2, 3)
DEPTHS = (14, 20, 32, 44, 68)
KINDS = ("ablation", "depth", "grid")
POLL_SECONDS = 0.2
PATIENCE_SECONDS = 60.0
"""How long a run that is asked to stop may take to write its checkpoint."""

Parse = Callable[[RunConfig, Sequence[str]], RunConfig]


@dataclass(frozen=True)
class Cell:
    """A run of the sweep."""

    values: dict[str, str]
    """What is varied, the seed not counted."""
    cfg: RunConfig
    folder: Path

    @property
    def name(self) -> str:
        return ", ".join([*(f"{key} {value}" for key, value in self.values.items()), f"seed {self.cfg.seed}"])


@dataclass(frozen=True)
class Outcome:
    cell: Cell
    error: str | None = None
    """The last line that the run said, where it failed; None where it is finished."""


def variations(kind: str, cfg: RunConfig, vary: Sequence[str]) -> dict[str, list[str]]:
    """Field -> the values that it takes: those of the kind of sweep, and those of `FIELD=V1,V2` in `vary`.

    Raises:
        ValueError: not such a text, a field twice, or nothing to vary.
    """
    depth = 6 * parse_model_name(cfg.model.name)[1] + 2
    fields: dict[str, list[str]] = {
        "ablation": {"model.name": _names([depth]), "model.levels": [str(k) for k in LEVELS]},
        "depth": {"model.name": _names(DEPTHS)},
        "grid": {},
    }[kind]
    for text in vary:
        name, separator, values = text.partition("=")
        found = [value.strip() for value in values.split(",")]
        name = name.strip().removeprefix("--").replace("-", "_")
        if not separator or not name or not all(found) or len(set(found)) < len(found):
            raise ValueError(f"--vary {text!r}, expected a field and different values, such as model.levels=1,2,3")
        if name in fields and kind == "grid":
            raise ValueError(f"--vary names {name} twice")
        fields[name] = found
    if "seed" in fields:
        raise ValueError("--vary seed=..., expected --seeds, over which means are taken")
    if not fields:
        raise ValueError("nothing to vary: give --vary FIELD=V1,V2, such as --vary optim.lr=0.1,0.05")
    return fields


def _names(depths: Sequence[int]) -> list[str]:
    return [f"{kind}_resnet{depth}" for kind in ("plain", "ds") for depth in depths]


def cells_of(cfg: RunConfig, fields: dict[str, list[str]], seeds: Sequence[int], out: Path, parse: Parse) -> list[Cell]:
    """Every combination of the fields' values, with every seed; `parse` gives a configuration with overrides."""
    cells = []
    for combination in itertools.product(*fields.values()):
        values = dict(zip(fields, combination, strict=True))
        varied = parse(cfg, [arg for name, value in values.items() for arg in spelt(name, value)])
        for seed in seeds:
            parts = [*(f"{name.rpartition('.')[2]}-{_safe(value)}" for name, value in values.items()), f"seed-{seed}"]
            cells.append(Cell(values, replace(varied, seed=seed), out / "_".join(parts)))
    return cells


def spelt(name: str, value: Any) -> list[str]:
    """A field's value as the command line spells it; a tuple's items, and a text's, are set apart by spaces."""
    option = "--" + name.replace("_", "-")
    if value is True or value == "true":
        return [option]
    if value is False or value == "false":
        before, dot, last = option.removeprefix("--").rpartition(".")
        return [f"--{before}{dot}no-{last}"]
    return [option, *(map(str, value) if isinstance(value, tuple) else str(value).split())]


def overrides(cfg: RunConfig, recipe: RunConfig) -> list[str]:
    """What makes `multifire train RECIPE` train this."""
    wanted, given = flatten_config(asdict(cfg)), flatten_config(asdict(recipe))
    return [arg for name, value in wanted.items() if value != given[name] for arg in spelt(name, value)]


def _safe(value: str) -> str:
    return "".join(c if c.isalnum() or c in ".-" else "-" for c in value)


@dataclass(frozen=True)
class Budget:
    """How long a sweep may take: so many epochs a run, or so many seconds in all."""

    text: str
    epochs: int | None = None
    seconds: float | None = None


Cost = tuple[float, float]
"""Seconds that a run takes to start, and for an epoch."""


def parse_budget(text: str) -> Budget:
    """`5 epochs`, or a time such as 30m.

    Raises:
        ValueError: neither.
    """
    count, _, unit = text.strip().partition("epoch")
    if unit in ("", "s") and count.strip().isdecimal() and "epoch" in text and int(count) > 0:
        return Budget(text, epochs=int(count))
    try:
        return Budget(text, seconds=parse_duration(text.strip(), "budget"))
    except ValueError:
        raise ValueError(f"budget is {text!r}, expected a number of epochs ('5 epochs') or a time (30m)") from None


def epochs_within(budget: Budget, cells: Sequence[Cell], cost: Callable[[RunConfig], Cost]) -> tuple[int, str]:
    """So many epochs for each run that the budget is kept, at most the recipe's, and a sentence that says so.

    Runs side by side share the cores, so they are reckoned as if one came after the other. What the reckoning itself
    takes comes off the budget.

    Raises:
        ValueError: not even one epoch fits; says what would.
    """
    full = max(cell.cfg.optim.epochs for cell in cells)
    if budget.epochs is not None:
        epochs = min(budget.epochs, full)
        return epochs, f"epochs of a run: {epochs} in place of {full}"
    assert budget.seconds is not None
    began, costs = time.monotonic(), {}
    for cell in cells:
        key = repr(replace(cell.cfg, seed=0))
        if key not in costs:
            costs[key] = cost(cell.cfg)
    start, each = (sum(costs[repr(replace(cell.cfg, seed=0))][i] for cell in cells) for i in (0, 1))
    left = budget.seconds - (time.monotonic() - began) - start
    epochs = min(int(left / each), full)
    if epochs < 1:
        raise ValueError(
            f"the {len(cells)} runs take about {format_seconds(start)} to start and {format_seconds(each)} for an "
            f"epoch of each, more than is left of the budget of {budget.text}; give fewer runs, or a --data.limit"
        )
    whole = format_seconds(start + epochs * each)
    return (
        epochs,
        f"epochs of a run: {epochs} in place of {full}, about {whole} for all, by a few steps of each network",
    )


def scaled(cfg: RunConfig, epochs: int) -> RunConfig:
    """The configuration with so many epochs, and the epochs of its schedule in proportion."""
    share = epochs / cfg.optim.epochs
    step, warmup = max(round(cfg.optim.step_epochs * share), 1), cfg.optim.warmup_epochs * share
    return replace(cfg, optim=replace(cfg.optim, epochs=epochs, step_epochs=step, warmup_epochs=warmup))


def is_finished(cell: Cell) -> bool:
    """Whether the cell's run is over.

    Raises:
        ValueError, OSError: its folder holds another run, or none.
    """
    run = RunFolder(cell.folder)
    if run.exists():
        run.check_same(cell.cfg)
    return run.exists() and (cell.folder / "summary.json").is_file()


@dataclass
class Job:
    """A run under way, in a process group of its own, so that a Ctrl-C reaches it once, and through us."""

    cell: Cell
    process: subprocess.Popen[bytes]
    log: Path

    def outcome(self) -> Outcome:
        if self.process.returncode == 0 and is_finished(self.cell):
            return Outcome(self.cell)
        lines = self.log.read_text(errors="replace").strip().splitlines()
        said = lines[-1].strip() if lines else "it said nothing"
        return Outcome(self.cell, f"exit code {self.process.returncode}: {said} (see {self.log})")


def start(cell: Cell, threads: int, logs: Path) -> Job:
    """Train the cell, from where it was left, in a process of so many threads."""
    log = logs / f"{cell.folder.name}.log"
    args = overrides(cell.cfg, get_recipe(cell.cfg.recipe))
    command = [sys.executable, "-m", "multifire", "train", cell.cfg.recipe, *args]
    command += ["--out", str(cell.folder), "--resume", "auto"]
    with log.open("ab") as file:
        process = subprocess.Popen(  # noqa: S603 - ourselves, without a shell
            command, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, start_new_session=True,
            env={**os.environ, "OMP_NUM_THREADS": str(threads)},
        )  # fmt: skip
    return Job(cell, process, log)


def carry_out(cells: Sequence[Cell], jobs: int, logs: Path) -> tuple[list[Outcome], int]:
    """Train every cell that is not finished, `jobs` at a time: what became of each, and the signal that came, or 0.

    A run that fails leaves the others alone.
    """
    outcomes: list[Outcome] = []
    waiting: list[Cell] = []
    for cell in cells:
        try:
            if is_finished(cell):
                outcomes.append(Outcome(cell))
            else:
                waiting.append(cell)
        except (ValueError, OSError) as error:
            outcomes.append(Outcome(cell, str(error)))
    logs.mkdir(parents=True, exist_ok=True)
    threads = max(len(os.sched_getaffinity(0)) // jobs, 1)
    running: list[Job] = []
    queue = iter(waiting)
    total = sum(cell.cfg.optim.epochs for cell in cells)
    with catch_signals() as asked, Bar("sweep", total, epochs_done(cells)) as bar, ended(running):
        there = len(cells) - len(waiting)
        bar.say(f"{len(cells)} runs, {there} of them there already; {jobs} at a time, threads of each: {threads}")
        while not asked.stop:
            running += [start(cell, threads, logs) for cell in itertools.islice(queue, jobs - len(running))]
            if not running:
                break
            for job in [job for job in running if job.process.poll() is not None]:
                running.remove(job)
                outcomes.append(job.outcome())
                bar.say(_line(outcomes[-1], len(outcomes), len(cells)))
            bar.update(epochs_done(cells), f"{len(outcomes)} of {len(cells)} runs")
            time.sleep(POLL_SECONDS)
    order = [cell.folder for cell in cells]
    return sorted(outcomes, key=lambda outcome: order.index(outcome.cell.folder)), asked.stop


def epochs_done(cells: Sequence[Cell]) -> int:
    done = 0
    for cell in cells:
        with contextlib.suppress(OSError):
            done += (cell.folder / "metrics.jsonl").read_bytes().count(b"\n")
    return done


@contextlib.contextmanager
def ended(running: list[Job]) -> Iterator[None]:
    """However the block ends, no process outlives it: each is asked to write a checkpoint, and killed if it hangs."""
    try:
        yield
    finally:
        for job in running:
            job.process.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + PATIENCE_SECONDS
        for job in running:
            try:
                job.process.wait(max(deadline - time.monotonic(), 0.1))
            except (subprocess.TimeoutExpired, KeyboardInterrupt):
                job.process.kill()
                job.process.wait()


def _line(outcome: Outcome, done: int, total: int) -> str:
    if outcome.error:
        return f"{done}/{total}  {outcome.cell.name}: failed, {outcome.error}"
    accuracy = Run(outcome.cell.folder).accuracy
    return f"{done}/{total}  {outcome.cell.name}: " + ("-" if accuracy is None else f"{100 * accuracy:.2f} %")


def sweep(
    cells: list[Cell], out: Path, *, budget: str | None, jobs: int,
    cost: Callable[[RunConfig], Cost], say: Callable[[str], None],
) -> tuple[list[Outcome], int]:  # fmt: skip
    """Carry out the runs in the folder `out`; what became of each, and the signal that stopped it, or 0.

    A budget is turned into epochs once, and kept in sweep.json, so that a sweep that is resumed goes on as it began.

    Raises:
        ValueError: the budget is too small, or another than the one that the sweep in the folder began with.
        FileExistsError: another process carries out a sweep in it.
    """
    out.mkdir(parents=True, exist_ok=True)
    with lock_folder(out):
        if budget is not None:
            cells = within_budget(cells, out / "sweep.json", parse_budget(budget), cost, say)
        return carry_out(cells, jobs, out / "logs")


def finish(outcomes: Sequence[Outcome], out: Path, with_report: bool) -> tuple[list[str], list[list[str]]]:
    """Write a report of the finished runs, with its figures, and the tables; names and cells of the readable one."""
    finished = [outcome.cell.folder for outcome in outcomes if outcome.error is None]
    if with_report:
        write_report(finished, out / "report.html", out / "figures")  # which measures what is not measured yet
    rows = table_rows(outcomes)
    names, lines = readable(rows)
    bars = ["| " + " | ".join(line) + " |" for line in [names, ["---"] * len(names), *lines]]
    write_atomic(out / "table.csv", csv_text(rows).encode())
    write_atomic(out / "table.md", ("\n".join(bars) + "\n").encode())
    write_atomic(out / "table.tex", latex(names, lines).encode())
    return names, lines


def within_budget(
    cells: list[Cell], record: Path, budget: Budget, cost: Callable[[RunConfig], Cost], say: Callable[[str], None]
) -> list[Cell]:
    """The cells with as many epochs as the budget allows or, of a sweep that goes on, allowed when it began."""
    if record.is_file():
        try:
            stored = json.loads(record.read_text())
            before, epochs = stored["budget"], int(stored["epochs"])
        except (ValueError, KeyError, TypeError, RecursionError):
            raise ValueError(
                f"{record}: not the record of a sweep; remove it, or give --out for another folder"
            ) from None
        if before != budget.text or epochs < 1:
            raise ValueError(
                f"{record}: the sweep began with a budget of {before}, not {budget.text}; give --out for another folder"
            )
        told = f"epochs of a run: {epochs}, as when the sweep began"
    else:
        epochs, told = epochs_within(budget, cells, cost)
        write_json(record, {"budget": budget.text, "epochs": epochs, "told": told})
    say(f"budget {budget.text}: {told}; the schedule's epochs are scaled likewise")
    return [replace(cell, cfg=scaled(cell.cfg, epochs)) for cell in cells]


COLUMNS: dict[str, tuple[Callable[[Run], float | None], float]] = {
    "test accuracy %": (lambda run: run.summary.get("test_accuracy"), 100),
    "dormant %": (lambda run: run.headline.get("dormant"), 100),
    "dormant, first layers %": (lambda run: first_layers(run, "dormant"), 100),
    "gradient, last over first": (lambda run: run.headline.get("gradient", {}).get("activation_ratio"), 1),
    "energy µJ": (lambda run: run.headline.get("energy", {}).get("snn_pj"), 1e-6),
}
"""Measure -> how it is found, and its unit's factor."""
FIRST_LAYERS = 3


def first_layers(run: Run, name: str) -> float | None:
    """Mean of a figure over the first layers of neurons."""
    found = [layer[name] for layer in run.headline.get("layers", [])[:FIRST_LAYERS] if layer[name] is not None]
    return sum(found) / len(found) if found else None


def table_rows(outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    """A row for each combination of values: how many of its runs finished, and each measure's mean and deviation."""
    rows: dict[tuple[str, ...], list[Run]] = {}
    values: dict[tuple[str, ...], dict[str, str]] = {}
    for outcome in outcomes:
        key = tuple(outcome.cell.values.values())
        values[key] = outcome.cell.values
        rows.setdefault(key, []).extend([] if outcome.error else [Run(outcome.cell.folder)])
    found = []
    for key, runs in rows.items():
        row: dict[str, Any] = {**values[key], "runs": len(runs)}
        for column, (measure, factor) in COLUMNS.items():
            known = [factor * value for run in runs if (value := measure(run)) is not None]
            mean, deviation = mean_and_deviation(known) if known else (None, None)
            row |= {column: mean, f"{column} std": deviation if len(known) > 1 else None}
        found.append(row)
    return found


def readable(rows: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Names of columns and cells with mean ± deviation; a measure that no run has is left out."""
    measures = [column for column in COLUMNS if any(row[column] is not None for row in rows)]
    fields = [name for name in rows[0] if name not in COLUMNS and not name.endswith(" std")]
    lines = [[show(row[name]) for name in fields] + [_spread(row, column) for column in measures] for row in rows]
    return fields + measures, lines


def _spread(row: dict[str, Any], column: str) -> str:
    mean, deviation = row[column], row[f"{column} std"]
    if mean is None:
        return "-"
    return f"{mean:.2f}" if deviation is None else f"{mean:.2f} ± {deviation:.2f}"


def latex(names: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A tabular for a paper that uses booktabs."""
    rows = [r"\begin{tabular}{" + "l" + "r" * (len(names) - 1) + "}", r"\toprule"]
    rows += [_latex_line(names), r"\midrule", *map(_latex_line, lines), r"\bottomrule", r"\end{tabular}"]
    return "\n".join(rows) + "\n"


def _latex_line(cells: Sequence[str]) -> str:
    special = {"\\": r"\textbackslash{}", "±": r"$\pm$", "µ": r"\textmu{}", **{c: f"\\{c}" for c in "&%$#_{}"}}
    return " & ".join("".join(special.get(c, c) for c in cell) for cell in cells) + r" \\"
