"""List the runs of a sweep: every combination of the varied fields, with every seed."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from multifire.config import RunConfig
from multifire.config.architecture import architecture, is_own_network
from multifire.config.json_format import flatten_config

LEVELS = (1, 2, 3)
DEPTHS = (14, 20, 32, 44, 68)
KINDS = ("ablation", "depth", "grid")

Parse = Callable[[RunConfig, Sequence[str]], RunConfig]
"""A function that applies command-line overrides to a configuration."""


@dataclass(frozen=True)
class Cell:
    """A run of the sweep."""

    values: dict[str, str]
    """Varied fields and their values, without the seed."""
    cfg: RunConfig
    folder: Path
    recipe: RunConfig
    """The recipe, before any override."""

    @property
    def name(self) -> str:
        """Fields, values and seed, such as "model.levels 2, seed 0"."""
        return ", ".join([*(f"{key} {value}" for key, value in self.values.items()), f"seed {self.cfg.seed}"])


@dataclass(frozen=True)
class Outcome:
    """The result of a run of the sweep."""

    cell: Cell
    error: str | None = None
    """Last message of a run that failed; None for a finished run."""


def variations(kind: str, cfg: RunConfig, vary: Sequence[str]) -> dict[str, list[str]]:
    """Return the varied fields and their values: those of the kind of sweep, and those of each `FIELD=V1,V2` in `vary`.

    Raises:
        ValueError: a text of another form, a field twice, or nothing to vary.
    """
    fields: dict[str, list[str]] = {
        "ablation": {"model.name": _model_names([_depth(cfg)]), "model.levels": [str(k) for k in LEVELS]},
        "depth": {"model.name": _model_names(DEPTHS)},
        "grid": {},
    }[kind]
    for text in vary:
        name, separator, listed = text.partition("=")
        values = [value.strip() for value in listed.split(",")]
        name = name.strip().removeprefix("--").replace("-", "_")
        if not separator or not name or not all(values) or len(set(values)) < len(values):
            raise ValueError(f"--vary {text!r}, expected a field and different values, such as model.levels=1,2,3")
        if name in fields and kind == "grid":
            raise ValueError(f"--vary names {name} twice; give all its values in one --vary")
        fields[name] = values
    if "seed" in fields:
        raise ValueError("--vary names seed; give --seeds instead, over which means are taken")
    if not fields:
        raise ValueError("nothing to vary: give --vary FIELD=V1,V2, such as --vary optim.lr=0.1,0.05")
    return fields


def _depth(cfg: RunConfig) -> int:
    return 20 if is_own_network(cfg.model.name) else architecture(cfg.model.name).depth


def _model_names(depths: Sequence[int]) -> list[str]:
    return [f"{kind}_resnet{depth}" for kind in ("plain", "ds") for depth in depths]


def make_cells(
    recipe: RunConfig, cfg: RunConfig, fields: dict[str, list[str]], seeds: Sequence[int], out: Path, parse: Parse
) -> list[Cell]:
    """Return a cell for every combination of the fields' values with every seed; `cfg` is the recipe with overrides."""
    cells = []
    for combination in itertools.product(*fields.values()):
        values = dict(zip(fields, combination, strict=True))
        varied = parse(cfg, [arg for name, value in values.items() for arg in option_args(name, value)])
        for seed in seeds:
            parts = [*(f"{name.rpartition('.')[2]}-{_safe(value)}" for name, value in values.items()), f"seed-{seed}"]
            cells.append(Cell(values, replace(varied, seed=seed), out / "_".join(parts), recipe))
    return cells


def option_args(name: str, value: Any) -> list[str]:
    """Return the command-line arguments that set a field; items of a tuple become separate arguments."""
    option = "--" + name.replace("_", "-")
    if value is True or value == "true":
        return [option]
    if value is False or value == "false":
        before, dot, last = option.removeprefix("--").rpartition(".")
        return [f"--{before}{dot}no-{last}"]
    return [option, *(map(str, value) if isinstance(value, tuple) else str(value).split())]


def train_args(cell: Cell) -> list[str]:
    """Return the arguments of `multifire train` for the cell: its recipe's name or file, and the overrides."""
    values, defaults = flatten_config(asdict(cell.cfg)), flatten_config(asdict(cell.recipe))
    changed = {name: value for name, value in values.items() if value != defaults[name]}
    overrides = [arg for name, value in changed.items() for arg in option_args(name, value)]
    return [cell.cfg.code or cell.cfg.recipe, *overrides]


def _safe(value: str) -> str:
    """Return the value with every character that is unusual in a file name replaced by a hyphen."""
    return "".join(c if c.isalnum() or c in ".-" else "-" for c in value)
