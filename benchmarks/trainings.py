"""The trainings of docs/results.md, in the order of their importance, and how they are worked off."""

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch

import multifire as mf
from benchmarks import relu  # noqa: F401  registers relu_resnet20
from benchmarks.tables import read_csv, write_csv
from multifire.config import RunConfig
from multifire.training.guards import PROCESS_START
from multifire.training.signals import Interrupted
from multifire.utils.device import pick_device, processor
from multifire.utils.errors import unknown

COLUMNS = (
    "name", "recipe", "options", "seed", "epoch", "train_loss", "train_accuracy", "test_loss", "test_accuracy",
    "validation_loss", "validation_accuracy", "seconds", "device", "torch",
)  # fmt: skip
Row = dict[str, Any]


@dataclass(frozen=True)
class Training:
    """A recipe with some values replaced."""

    name: str
    recipe: str
    about: str
    options: dict[str, Any] = field(default_factory=dict)
    table: Literal["trainings", "search", "events"] = "trainings"
    """The table of docs/results.md in which it stands."""


BATCH = {"precision": "bf16", "optim.batch_size": 128}
SHORT = {**BATCH, "optim.epochs": 40, "optim.schedule": "one-cycle"}
MODERN = {
    "optim.schedule": "one-cycle", "optim.label_smoothing": 0.1, "optim.loss": "tet", "optim.ema_decay": 0.999,
    "data.cutout": 8, "data.trivial_augment": True, "model.learn_thresholds": True, "model.learn_decay": True,
}  # fmt: skip
"""The candidates for a better recipe; one stays if its short run (`search-`) is better on the validation split."""
SEARCH = {**BATCH, "optim.epochs": 15, "data.validation": 0.1}
SEARCHED: dict[str, dict[str, Any]] = {
    "base": {},
    "smoothing": {"optim.label_smoothing": 0.1},
    "tet": {"optim.loss": "tet"},
    "average": {"optim.ema_decay": 0.999},
    "cutout": {"data.cutout": 8},
    "trivial": {"data.trivial_augment": True},
    "learned": {"model.learn_thresholds": True, "model.learn_decay": True},
    "decay": {"optim.weight_decay": 5e-4},
    "adamw": {"optim.optimizer": "adamw", "optim.lr": 2e-3, "optim.weight_decay": 0.05},
    "all": MODERN,
}
"""Short runs at a quarter of the width, one change each, compared on a tenth of the training set that is held out."""
PAPER_STYLE = {
    "optim.schedule": "step", "optim.label_smoothing": 0.0,
    "data.roll": 0, "data.rotation": 0.0, "data.cutout": 0, "data.time_jitter": 0,
}  # fmt: skip
"""As the paper trains on events: steps at each third of the epochs, neither augmentation nor label smoothing."""
EVENTS = tuple(
    Training(f"{recipe}-{style}-{seed}", recipe, about, {"seed": seed, **change}, "events")
    for recipe, third in (("nmnist", 13), ("digits-dvs", 2))
    for style, about, change in (
        ("own", "our recipe", {}),
        ("paper", "in the paper's style", {**PAPER_STYLE, "optim.step_epochs": third}),
    )
    for seed in (0, 1, 2)
)
TRAININGS = (
    Training("cifar10", "cifar10", "the paper's recipe, 110 epochs", BATCH),
    Training(
        "cifar10-relu", "cifar10", "the same network with ReLU, one time step: what these images allow",
        {**BATCH, "model.name": "relu_resnet20", "data.timesteps": 1},
    ),
    *(
        Training(f"search-{name}", "cifar10-small", "a short run for validation", {**SEARCH, **change}, "search")
        for name, change in SEARCHED.items()
    ),
    Training("cifar10-modern", "cifar10", "what the short runs chose, half the epochs",
             {**BATCH, **MODERN, "optim.epochs": 55}),
    Training("cifar10-small", "cifar10-small", "a quarter of the width, 30 epochs", {"precision": "bf16"}),
    Training("cifar10-lif", "cifar10", "the paper's recipe with K = 1", {**BATCH, "model.levels": 1}),
    Training("cifar10-plain", "cifar10", "the same with plain blocks", {**BATCH, "model.name": "plain_resnet20"}),
    Training("cifar10-t4-k3", "cifar10", "40 epochs, one-cycle: T = 4, K = 3", SHORT),
    Training("cifar10-t2-k4", "cifar10", "T = 2, K = 4", {**SHORT, "data.timesteps": 2, "model.levels": 4}),
    Training("cifar10-t2-k6", "cifar10", "T = 2, K = 6", {**SHORT, "data.timesteps": 2, "model.levels": 6}),
    Training("cifar10-t1-k8", "cifar10", "T = 1, K = 8", {**SHORT, "data.timesteps": 1, "model.levels": 8}),
    Training(
        "cifar10-speed", "cifar10", "20 epochs of large batches: seconds to an accuracy",
        {**SHORT, "optim.batch_size": 512, "optim.lr": 0.2, "optim.epochs": 20, "optim.label_smoothing": 0.1},
    ),
    *EVENTS,
)  # fmt: skip
TINY = {"data.limit": 32, "model.width": 4, "optim.batch_size": 16, "optim.epochs": 2}


def chosen(names: Sequence[str] | None, *, tiny: bool = False) -> list[Training]:
    """Return the trainings with these names, in this order; None: all.

    Raises:
        ValueError: there is no such training.
    """
    known = {training.name: training for training in TRAININGS}
    for name in names or ():
        if name not in known:
            raise unknown("training", name, known)
    found = [known[name] for name in names or known]
    return [replace(each, options={**each.options, **TINY}) for each in found] if tiny else found


def train_in_turn(trainings: Iterable[Training], state: Path, root: str, path: Path, deadline: float) -> None:
    """Train until the time is over; continue what an earlier call has stopped, and skip what has ended.

    Args:
        trainings: what to train, in order.
        state: folder of the run folders.
        root: folder of the data sets.
        path: the CSV file, in which each epoch has a row.
        deadline: time.monotonic() at which to stop.
    """
    for training in trainings:
        cfg = mf.recipe(training.recipe, **{**training.options, "data.root": root})
        if finished_epochs(path, training.name) >= cfg.optim.epochs:
            continue
        if time.monotonic() >= deadline:
            print(f"{training.name}: no time is left", flush=True)
            return
        print(f"{training.name}: {training.about}", flush=True)
        try:
            train(training, cfg, state / training.name, path, deadline)
        except Interrupted as stopped:
            print(f"{training.name}: {stopped}", flush=True)
            return
        except (ValueError, FileNotFoundError, FloatingPointError, MemoryError) as error:
            print(f"{training.name}: failed, {error}", flush=True)  # the others may do better


def train(training: Training, cfg: RunConfig, out: Path, path: Path, deadline: float) -> None:
    """Train or continue one run."""

    def write(figures: Row) -> None:
        others = [row for row in read_csv(path) if (row["name"], row["epoch"]) != (training.name, str(epoch(figures)))]
        write_csv(path, COLUMNS, [*others, row_of(training, cfg, figures)])

    limit = deadline - PROCESS_START
    run = mf.train(cfg, out, on_epoch=write, resume="auto", max_time=f"{limit:.0f}s", analyze_every=0, track=(), keep=1)
    for figures in run.metrics[finished_epochs(path, training.name) :]:
        write(figures)  # epochs of an earlier call whose CSV file has been lost


def row_of(training: Training, cfg: RunConfig, figures: Row) -> Row:
    """Return the row of an epoch."""
    device = pick_device(cfg.device)
    known = {name: figures[name] for name in COLUMNS if name in figures}
    return known | {
        "name": training.name,
        "recipe": training.recipe,
        "options": " ".join(f"--{name.replace('_', '-')} {value}" for name, value in training.options.items()),
        "seed": cfg.seed,
        "epoch": epoch(figures),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else processor(),
        "torch": torch.__version__,
    }


def epoch(figures: Row) -> int:
    """Return the number of finished epochs."""
    return figures["epoch"] + 1


def finished_epochs(path: Path, name: str) -> int:
    """Return how many epochs of a training the CSV file has."""
    return max((int(row["epoch"]) for row in read_csv(path) if row["name"] == name), default=0)
