"""Train from Python as the command line does, with parts of one's own."""

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from multifire import datasets
from multifire.config import ModelConfig, RunConfig, TrainOptions
from multifire.config.architecture import GIVEN, is_buildable
from multifire.datasets.registry import is_own
from multifire.nn import SpikingNetwork, config_of_model
from multifire.report import Run
from multifire.training.loop import train as train_run
from multifire.training.own import Loss, MakeOptimizer, Own


def train(
    cfg: RunConfig,
    out: str | Path | None = None,
    *,
    network: nn.Module | None = None,
    data: datasets.Dataset | None = None,
    loss: Loss | None = None,
    optimizer: MakeOptimizer | None = None,
    on_epoch: Callable[[dict[str, Any]], None] | None = None,
    **options: Any,
) -> Run:
    """Train a network and return the run, as `multifire train` does.

        run = mf.train(mf.recipe("digits", **{"optim.epochs": 3}), network=MyNetwork())

    Args:
        cfg: the configuration, such as `mf.recipe("digits")`. A part that is given below takes the place of its own.
        out: the run's folder (default: runs/RECIPE-DATE-TIME).
        network: [T, N, C, H, W] -> logits of each time step [T, N, classes], or one of multifire's networks. Of
            cfg.model only num_classes counts then.
        data: a data set; see `mf.datasets.from_arrays` and `mf.datasets.from_dataset`.
        loss: function of the logits [T, N, classes] and the classes [N] that returns the mean loss of the samples.
        optimizer: function that makes an optimiser of the parameters, for instance
            `lambda parameters: torch.optim.AdamW(parameters, 1e-3)`. Its learning rate is the schedule's highest.
        on_epoch: called after each epoch with its record.
        options: fields of TrainOptions, such as resume, max_time or analyze_every.

    Raises:
        ValueError: the configuration, a part of one's own, the data or a checkpoint is not usable.
        FileNotFoundError: the data or the run to resume are missing.
        FileExistsError: `out` has a run and `resume` is "no", or another process trains in it.
        FloatingPointError: a loss or a gradient is NaN or infinite; the last good checkpoint is kept.
        MemoryError: a step needs too much memory; the message names a batch size that fits.
        OSError: the disk is full.
    """
    if network is not None:
        cfg = dataclasses.replace(cfg, model=_model_of(network, cfg))
    if data is not None and data.name not in datasets.DATASETS and not is_own(data.name):
        data = dataclasses.replace(data, name=f"{GIVEN}{data.name}")
    folder = Path(out) if out is not None else Path("runs") / f"{cfg.recipe}-{time.strftime('%Y%m%d-%H%M%S')}"
    train_run(cfg, folder, TrainOptions(**options), Own(network, data, loss, optimizer, on_epoch))
    return Run(folder)


def _model_of(network: nn.Module, cfg: RunConfig) -> ModelConfig:
    """Return the description of a network that is given as an object."""
    if isinstance(network, SpikingNetwork) and is_buildable(network.name):
        return config_of_model(network)
    return dataclasses.replace(cfg.model, name=f"{GIVEN}{type(network).__name__}")
