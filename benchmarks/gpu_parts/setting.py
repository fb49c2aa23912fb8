"""What all parts share: the device, the cases, the rows of the CSV files, and the items of work of a part.

Shapes: T time steps, N samples, C channels, H rows, W columns, L classes.
"""

import csv
import datetime
import os
import subprocess
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.cases import Case
from multifire import __version__
from multifire.config import get_recipe
from multifire.utils.device import processor

MACHINE = ("card", "driver", "torch", "cuda", "cudnn", "triton", "multifire", "date")
"""Columns of every file."""
NETWORK = ("recipe", "precision", "model", "width", "levels", "timesteps", "batch", "channels", "size")
TIMES = ("n", "calls", "median_s", "fastest_s", "slowest_s", "wall_s", "ratio")
"""Columns of a measurement: n runs of `calls` calls each; seconds of a call on the device, and `wall_s` on the host."""


class Item(NamedTuple):
    """A piece of work within a part."""

    name: str
    guess: float
    """Seconds that it takes on an H100, or on a CPU in its small size; scaled by what earlier items took."""
    run: Callable[[], Iterable[Mapping[str, Any]]]
    """Does the work and returns rows."""


class Part(NamedTuple):
    """A part of the benchmark: the columns of its file, and its items."""

    columns: Sequence[str]
    items: Callable[["Setting"], list[Item]]


@dataclass(frozen=True)
class Setting:
    """The device, and how much is measured."""

    device: torch.device
    root: Path | None = None
    """Folder of the data sets; None: random images."""

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def runs(self) -> int:
        """Measured runs of each call."""
        return 15 if self.on_gpu else 2

    @property
    def calls(self) -> int:
        """Calls in a run, one after the other: the host prepares a call while the device computes the one before."""
        return 5 if self.on_gpu else 1

    def case(self, recipe: str, batch: int | None = None, precision: str = "bf16", **model: Any) -> Case:
        """Return a recipe's network and input; on a CPU a small network of the same kind."""
        cfg = get_recipe(recipe)
        static = recipe.startswith("cifar10") and "dvs" not in recipe
        case = Case(replace(cfg, precision=precision), 32 if static else cfg.data.frame_size, static)
        case = case.with_(batch_size=batch, **model)
        if self.on_gpu:
            return case
        kind = cfg.model.name.partition("_")[0]
        return replace(case.with_(batch_size=2, timesteps=2, name=f"{kind}_resnet8", width=8), size=8)

    def batch(self, case: Case) -> tuple[Tensor, Tensor]:
        """Return x [T, N, C, H, W] and labels [N] on the device; the images of a static input are not repeated."""
        x_TNCHW, y = case.batch()
        if case.static:
            return x_TNCHW[0].to(self.device).expand(case.shape), y.to(self.device)
        return x_TNCHW.to(self.device), y.to(self.device)


def describe(case: Case) -> dict[str, Any]:
    """Return the columns NETWORK of a row."""
    model, (timesteps, batch, channels, size, _) = case.cfg.model, case.shape
    values = (case.cfg.recipe, case.cfg.precision, model.name, model.width, model.levels, timesteps, batch)
    return dict(zip(NETWORK, (*values, channels, size), strict=True))


def machine(device: torch.device) -> dict[str, str]:
    """Return the columns MACHINE of a row."""
    on_gpu = device.type == "cuda"
    values = (
        torch.cuda.get_device_name(device) if on_gpu else processor(),
        _driver() if on_gpu else "",
        torch.__version__,
        torch.version.cuda or "",
        str(torch.backends.cudnn.version() or "") if on_gpu else "",
        _version_of_triton(),
        __version__,
        datetime.datetime.now(datetime.UTC).date().isoformat(),
    )
    return dict(zip(MACHINE, values, strict=True))


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return "unknown"


def _version_of_triton() -> str:
    try:
        import triton
    except ImportError:
        return ""
    return triton.__version__


class Table:
    """A CSV file to which rows are added; each is on the disk before the next one is measured."""

    def __init__(self, path: Path, columns: Sequence[str], constant: Mapping[str, Any], append: bool = False):
        """Write the header, or with `append` keep the rows that are there.

        Args:
            path: the file.
            columns: names of the columns of a row; an `error` and the columns of `constant` follow.
            constant: values that are the same in every row.
            append: continue a file.
        """
        self._path, self._constant = path, constant
        self._columns = [*columns, "error", *constant]
        path.parent.mkdir(parents=True, exist_ok=True)
        if not (append and path.is_file()):
            self._write("w", dict(zip(self._columns, self._columns, strict=True)))

    def add(self, row: Mapping[str, Any]) -> None:
        """Write a row, floats with six digits.

        Raises:
            ValueError: a field is no column.
        """
        if unknown := set(row) - set(self._columns):
            raise ValueError(f"{self._path}: {unknown} are no columns")
        values = {name: f"{v:.6g}" if isinstance(v, float) else v for name, v in row.items()}
        self._write("a", values | dict(self._constant))

    def _write(self, mode: str, row: Mapping[str, Any]) -> None:
        with self._path.open(mode, newline="") as file:
            csv.DictWriter(file, self._columns, restval="", lineterminator="\n").writerow(row)
            file.flush()
            os.fsync(file.fileno())
