"""Turn the budget of a sweep into a number of epochs."""

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
    """Limit of a sweep: the epochs of each run, or the seconds of all runs together."""

    text: str
    epochs: int | None = None
    seconds: float | None = None


def apply_budget(
    cells: list[Cell], record: Path, budget: Budget, cost: Callable[[RunConfig], Cost], say: Callable[[str], None]
) -> list[Cell]:
    """Return the cells with the number of epochs that the budget allows.

    The first call writes this number to the file `record`; a continued sweep reads it from there.

    Raises:
        ValueError: the record is damaged, the sweep began with another budget, or the budget is too small.
    """
    if record.is_file():
        try:
            stored = json.loads(record.read_text())
            stored_budget, epochs = stored["budget"], int(stored["epochs"])
        except (ValueError, KeyError, TypeError, RecursionError):
            raise ValueError(
                f"{record}: not the record of a sweep; remove it, or give --out for another folder"
            ) from None
        if stored_budget != budget.text or epochs < 1:
            raise ValueError(
                f"{record}: the sweep began with a budget of {stored_budget}, not {budget.text}; "
                "give that budget, or --out for another folder"
            )
        explanation = f"{epochs} epochs per run, as when the sweep began"
    else:
        epochs, explanation = epochs_for_budget(budget, cells, cost)
        write_json(record, {"budget": budget.text, "epochs": epochs, "told": explanation})
    say(f"budget {budget.text}: {explanation}; the epochs of the schedule are scaled too")
    return [replace(cell, cfg=scale_epochs(cell.cfg, epochs)) for cell in cells]


def parse_budget(text: str) -> Budget:
    """Parse a number of epochs such as `5 epochs`, or a time such as 30m.

    Raises:
        ValueError: the text is neither.
    """
    count, _, unit = text.strip().partition("epoch")
    if unit in ("", "s") and count.strip().isdecimal() and "epoch" in text and int(count) > 0:
        return Budget(text, epochs=int(count))
    try:
        return Budget(text, seconds=parse_duration(text.strip(), "budget"))
    except ValueError:
        raise ValueError(f"budget is {text!r}, expected a number of epochs ('5 epochs') or a time (30m)") from None


def epochs_for_budget(budget: Budget, cells: Sequence[Cell], cost: Callable[[RunConfig], Cost]) -> tuple[int, str]:
    """Return the number of epochs per run that fits the budget, and an explanation for the user.

    Runs side by side share the cores, so their times are added up. The time spent on measuring the costs is subtracted.

    Raises:
        ValueError: not even one epoch fits.
    """
    full_epochs = max(cell.cfg.optim.epochs for cell in cells)
    if budget.epochs is not None:
        epochs = min(budget.epochs, full_epochs)
        return epochs, f"{epochs} epochs per run instead of {full_epochs}"
    assert budget.seconds is not None
    began, costs = time.monotonic(), {}
    keys = [repr(replace(cell.cfg, seed=0)) for cell in cells]  # seeds do not change the cost
    for key, cell in zip(keys, cells, strict=True):
        if key not in costs:
            costs[key] = cost(cell.cfg)
    start_seconds, epoch_seconds = (sum(costs[key][i] for key in keys) for i in (0, 1))
    remaining = budget.seconds - (time.monotonic() - began) - start_seconds
    epochs = min(int(remaining / epoch_seconds), full_epochs)
    if epochs < 1:
        raise ValueError(
            f"the {len(cells)} runs need about {format_seconds(start_seconds)} to start and "
            f"{format_seconds(epoch_seconds)} for one epoch each, more than the rest of the budget of {budget.text}; "
            "give a larger --budget, fewer runs, or a --data.limit"
        )
    total = format_seconds(start_seconds + epochs * epoch_seconds)
    explanation = f"{epochs} epochs per run instead of {full_epochs}"
    return epochs, f"{explanation}, about {total} for all runs, estimated from a few steps"


def scale_epochs(cfg: RunConfig, epochs: int) -> RunConfig:
    """Return the configuration with this number of epochs; the epochs of its schedule are scaled in proportion."""
    factor = epochs / cfg.optim.epochs
    step, warmup = max(round(cfg.optim.step_epochs * factor), 1), cfg.optim.warmup_epochs * factor
    return replace(cfg, optim=replace(cfg.optim, epochs=epochs, step_epochs=step, warmup_epochs=warmup))
