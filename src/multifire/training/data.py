"""Load the batches of a run: for training, for choosing the best epoch, for the test, and for the analysis."""

from dataclasses import dataclass
from typing import Any

import torch

from multifire import datasets
from multifire.config import DataConfig, RunConfig
from multifire.datasets.loader import Batches, EventBatches, make_batches
from multifire.training.distributed import ALONE, Processes

IMAGES_ONLY = ("crop_padding", "random_erasing", "trivial_augment", "mixup")
EVENTS_ONLY = ("roll", "rotation", "swap_polarity", "time_jitter", "flip_x", "flip_y")


@dataclass(frozen=True)
class RunBatches:
    """Batches of a run, by purpose."""

    cfg: RunConfig
    """The configuration of the run, with everything that comes from the data."""
    info: datasets.DatasetInfo
    """What the data set is."""
    train: Batches | EventBatches
    selection: Batches | EventBatches
    """Scored after every epoch to choose the best one: the validation split if there is one, else the test split."""
    test: Batches | EventBatches
    selection_analysis: Batches | EventBatches
    """A few samples of `selection`, which are analysed after an epoch."""
    test_analysis: Batches | EventBatches
    """A few samples of `test`, which are analysed at the end."""


def load_batches(
    cfg: RunConfig, device: torch.device, processes: Processes = ALONE, own: datasets.Dataset | None = None
) -> RunBatches:
    """Load the data set of `cfg`, unless the user gives one, and split it into the batches of a run.

    Raises:
        ValueError: the network or an option does not fit the data.
        FileNotFoundError: the data are missing.
    """
    data = datasets.load(cfg.data.name, cfg.data.root, cfg.data) if own is None else own
    cfg = datasets.complete(cfg, data)
    check_fits(cfg, data)
    train, selection = data.train, data.test
    if cfg.data.validation:
        train, selection = datasets.hold_out(data.train, cfg.data.validation, cfg.seed)
    if cfg.data.limit:
        train = datasets.take(train, cfg.data.limit, cfg.seed)
    count = analysis_samples(len(train))
    per_step = max(1, cfg.optim.batch_size // (cfg.optim.accumulate * processes.world))
    training: dict[str, Any] = {
        "batch_size": cfg.optim.batch_size,
        "shuffle": True,
        "seed": cfg.seed,
        "augment": data.augment,
    }
    scoring: dict[str, Any] = {"batch_size": cfg.eval_batch_size, "shuffle": False}
    analysis: dict[str, Any] = {"batch_size": min(count, per_step), "shuffle": False}

    def batches(split: Any, options: dict[str, Any], part: tuple[int, int] = (0, 1)) -> Batches | EventBatches:
        return make_batches(split, data.info, cfg.data, device=device, processes=part, **options)

    return RunBatches(
        cfg=cfg,
        info=data.info,
        train=batches(train, training, processes.rank_and_world),
        selection=batches(selection, scoring, processes.rank_and_world),
        test=batches(data.test, scoring, processes.rank_and_world),
        selection_analysis=batches(datasets.take(selection, count, cfg.seed), analysis),
        test_analysis=batches(datasets.take(data.test, 4 * count, cfg.seed), analysis),
    )


def analysis_samples(train_samples: int) -> int:
    """Return the number of samples to analyse: so few that it takes less than a twentieth of the epoch's time."""
    return max(4, min(train_samples // 500, 100))


def check_fits(cfg: RunConfig, data: datasets.Dataset) -> None:
    """Raise a ValueError if the network or an option does not fit the data set."""
    for field, found, expected in (
        ("model.in_channels", cfg.model.in_channels, data.info.channels),
        ("model.num_classes", cfg.model.num_classes, len(data.info.classes)),
    ):
        if found != expected:
            raise ValueError(f"{field} is {found}, but {data.name} has {expected}; give --{field} {expected}")
    defaults = DataConfig()
    for name in IMAGES_ONLY if data.info.events else EVENTS_ONLY:
        if getattr(cfg.data, name) != getattr(defaults, name):
            kind = "events" if data.info.events else "images"
            raise ValueError(f"data.{name} is {getattr(cfg.data, name)}, but {data.name} holds {kind}; leave it out")
    shortest = min(data.info.height_width)
    if cfg.data.crop_padding > shortest:
        raise ValueError(f"data.crop_padding is {cfg.data.crop_padding}, expected at most the image's {shortest}")
