"""Turn a sweep's budget of time into a number of epochs."""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from multifire.config import RunConfig
from multifire.config.schema import parse_duration
from multifire.experiments.sweep_cells import Cell
from multifire.utils.files import write_json
from multifire.utils.progress import format_seconds

Cost = tuple[float, float]
"""Seconds to start a run, and seconds for an epoch."""


@dataclass(frozen=True)
class Budget:
    """Limit of a sweep: epochs of each run, or seconds of all runs together."""

    text: str
    epochs: int | None = None
    seconds: float | None = None


def within_budget(
    cells: list[Cell], record: Path, budget: Budget, cost: Callable[[RunConfig], Cost], say: Callable[[str], None]
) -> list[Cell]:
    """Return the cells with the number of epochs that the budget allows; a continued sweep reads it from `record`.

    Raises:
        ValueError: a damaged record, another budget than the sweep began with, or a budget that is too small.
    """
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
        summary = f"epochs of a run: {epochs}, as when the sweep began"
    else:
        epochs, summary = epochs_within(budget, cells, cost)
        write_json(record, {"budget": budget.text, "epochs": epochs, "told": summary})
    say(f"budget {budget.text}: {summary}; the epochs of the schedule are scaled too")
    return [replace(cell, cfg=scaled(cell.cfg, epochs)) for cell in cells]


def parse_budget(text: str) -> Budget:
    """Parse `5 epochs` or a time such as 30m.

    Raises:
        ValueError: neither of them.
    """
    count, _, unit = text.strip().partition("epoch")
    if unit in ("", "s") and count.strip().isdecimal() and "epoch" in text and int(count) > 0:
        return Budget(text, epochs=int(count))
    try:
        return Budget(text, seconds=parse_duration(text.strip(), "budget"))
    except ValueError:
        raise ValueError(f"budget is {text!r}, expected a number of epochs ('5 epochs') or a time (30m)") from None


def epochs_within(budget: Budget, cells: Sequence[Cell], cost: Callable[[RunConfig], Cost]) -> tuple[int, str]:
    """Return the number of epochs of each run that fits the budget, and a sentence about it.

    Runs side by side share the cores, so their times are added up. The time of measuring the costs is subtracted.

    Raises:
        ValueError: not even one epoch fits; the message says what would.
    """
    full = max(cell.cfg.optim.epochs for cell in cells)
    if budget.epochs is not None:
        epochs = min(budget.epochs, full)
        return epochs, f"epochs of a run: {epochs} in place of {full}"
    assert budget.seconds is not None
    start_time, costs = time.monotonic(), {}
    for cell in cells:
        key = repr(replace(cell.cfg, seed=0))
        if key not in costs:
            costs[key] = cost(cell.cfg)
    start, epoch = (sum(costs[repr(replace(cell.cfg, seed=0))][i] for cell in cells) for i in (0, 1))
    remaining = budget.seconds - (time.monotonic() - start_time) - start
    epochs = min(int(remaining / epoch), full)
    if epochs < 1:
        raise ValueError(
            f"the {len(cells)} runs take about {format_seconds(start)} to start and {format_seconds(epoch)} for an "
            f"epoch of each, more than the rest of the budget of {budget.text}; give fewer runs, or a --data.limit"
        )
    total = format_seconds(start + epochs * epoch)
    return (
        epochs,
        f"epochs of a run: {epochs} in place of {full}, about {total} for all runs, estimated from a few steps",
    )


def scaled(cfg: RunConfig, epochs: int) -> RunConfig:
    """Return the configuration with this number of epochs, and the epochs of its schedule in proportion."""
    factor = epochs / cfg.optim.epochs
    step, warmup = max(round(cfg.optim.step_epochs * factor), 1), cfg.optim.warmup_epochs * factor
    return replace(cfg, optim=replace(cfg.optim, epochs=epochs, step_epochs=step, warmup_epochs=warmup))
