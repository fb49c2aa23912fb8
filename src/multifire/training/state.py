"""A run in progress, and how it is set up from its configuration."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from multifire import datasets
from multifire.config import RunConfig, TrainOptions
from multifire.nn import SpikingResNet, TdBatchNorm2d, model_from_config
from multifire.training.checkpoint import Position
from multifire.training.data import RunBatches, load_batches
from multifire.training.distributed import Processes, device_name, was_restarted
from multifire.training.optim import make_optimizer
from multifire.training.run_folder import RunFolder
from multifire.training.signals import Requests
from multifire.utils.device import pick_device
from multifire.utils.files import check_free_space


@dataclass
class Training:
    """A run in progress: its configuration, data, network, optimiser and position."""

    cfg: RunConfig
    options: TrainOptions
    run: RunFolder
    processes: Processes
    batches: RunBatches
    model: SpikingResNet
    network: nn.Module
    """The model or, with several processes, its DistributedDataParallel wrapper."""
    optimizer: torch.optim.Optimizer
    average: AveragedModel | None
    """Moving average of the weights; None without `optim.ema_decay`."""
    position: Position
    requests: Requests

    @property
    def steps_per_epoch(self) -> int:
        """Number of batches of the training set."""
        return len(self.batches.train)

    @property
    def step(self) -> int:
        """Number of the next training step, counted from 0 at the start of the run."""
        return self.position.epoch * self.steps_per_epoch + self.position.step

    @property
    def sample_name(self) -> str:
        """The word for samples in messages: "images", or "samples" for events."""
        return "samples" if datasets.get_info(self.cfg.data.name).events else "images"

    @property
    def scored_model(self) -> SpikingResNet:
        """The network that is scored and saved as best: the moving average of the weights, or else the model."""
        return self.model if self.average is None else cast(SpikingResNet, self.average.module)

    @property
    def is_finished(self) -> bool:
        """True if all epochs are done, or if `optim.patience` epochs in a row brought no better accuracy."""
        position, optim = self.position, self.cfg.optim
        since_best = 0 if position.best_epoch is None else position.epoch - 1 - position.best_epoch
        return position.epoch >= optim.epochs or (optim.patience is not None and since_best >= optim.patience)


def set_up(cfg: RunConfig, folder: Path, options: TrainOptions, processes: Processes, requests: Requests) -> Training:
    """Load the data of a run, and build its network and optimiser."""
    device = pick_device(device_name(cfg.device))
    cfg = scale_to_processes(cfg, processes.world)
    batches = load_batches(cfg, device, processes)
    torch.manual_seed(cfg.seed)
    model = model_from_config(cfg.model, cfg.backend).to(device)
    for norm in model.modules():
        if isinstance(norm, TdBatchNorm2d):
            norm.sync = cfg.sync_norm and processes.world > 1
    network = processes.wrap(model, share_buffers=not cfg.sync_norm)
    average = None
    if cfg.optim.ema_decay is not None:
        average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(cfg.optim.ema_decay), use_buffers=True)
    optimizer = make_optimizer(model, cfg.optim)
    run = RunFolder(folder)
    return Training(cfg, options, run, processes, batches, model, network, optimizer, average, Position(), requests)


def scale_to_processes(cfg: RunConfig, world: int) -> RunConfig:
    """Return the configuration with learning rate and batch size multiplied by `world` if `optim.scaling` is linear."""
    if cfg.optim.scaling != "linear":
        return cfg
    return replace(cfg, optim=replace(cfg.optim, lr=cfg.optim.lr * world, batch_size=cfg.optim.batch_size * world))


@contextlib.contextmanager
def open_run_folder(training: Training) -> Iterator[None]:
    """Create or check the run's folder and lock it in the first process; the others wait until that is done."""
    with contextlib.ExitStack() as stack:
        if training.processes.is_first:
            run, options = training.run, training.options
            resume = options.resume == "yes" or ((options.resume == "auto" or was_restarted()) and run.exists())
            check_free_space(run.path, 3 * sum(tensor.nbytes for tensor in training.model.state_dict().values()))
            stack.enter_context(run.open_for_training(training.cfg, resume, options.track))
        training.processes.wait()
        yield
