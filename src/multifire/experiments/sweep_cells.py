"""The runs of a sweep: every combination of the varied fields, with every seed."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from multifire.config import RunConfig
from multifire.config.architecture import parse_model_name
from multifire.config.json_format import flatten_config

LEVELS = (1, 2, 3)
DEPTHS = (14, 20, 32, 44, 68)
KINDS = ("ablation", "depth", "grid")

Parse = Callable[[RunConfig, Sequence[str]], RunConfig]
"""Applies overrides of the command line to a configuration."""


@dataclass(frozen=True)
class Cell:
    """A run of the sweep."""

    values: dict[str, str]
    """Varied fields and their values, without the seed."""
    cfg: RunConfig
    folder: Path

    @property
    def name(self) -> str:
        return ", ".join([*(f"{key} {value}" for key, value in self.values.items()), f"seed {self.cfg.seed}"])


@dataclass(frozen=True)
class Outcome:
    """The result of a run of the sweep."""

    cell: Cell
    error: str | None = None
    """Last message of a run that failed; None if it is finished."""


def variations(kind: str, cfg: RunConfig, vary: Sequence[str]) -> dict[str, list[str]]:
    """Return the varied fields and their values: those of the kind of sweep, and those of `FIELD=V1,V2` in `vary`.

    Raises:
        ValueError: a malformed text, a field twice, or nothing to vary.
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
    """Return a cell for every combination of the fields' values and every seed."""
    cells = []
    for combination in itertools.product(*fields.values()):
        values = dict(zip(fields, combination, strict=True))
        varied = parse(cfg, [arg for name, value in values.items() for arg in spelt(name, value)])
        for seed in seeds:
            parts = [*(f"{name.rpartition('.')[2]}-{_safe(value)}" for name, value in values.items()), f"seed-{seed}"]
            cells.append(Cell(values, replace(varied, seed=seed), out / "_".join(parts)))
    return cells


def spelt(name: str, value: Any) -> list[str]:
    """Return the command-line arguments that set a field; items of a tuple become separate arguments."""
    option = "--" + name.replace("_", "-")
    if value is True or value == "true":
        return [option]
    if value is False or value == "false":
        before, dot, last = option.removeprefix("--").rpartition(".")
        return [f"--{before}{dot}no-{last}"]
    return [option, *(map(str, value) if isinstance(value, tuple) else str(value).split())]


def overrides(cfg: RunConfig, recipe: RunConfig) -> list[str]:
    """Return the overrides with which `multifire train RECIPE` trains `cfg`."""
    wanted, given = flatten_config(asdict(cfg)), flatten_config(asdict(recipe))
    return [arg for name, value in wanted.items() if value != given[name] for arg in spelt(name, value)]


def _safe(value: str) -> str:
    return "".join(c if c.isalnum() or c in ".-" else "-" for c in value)
