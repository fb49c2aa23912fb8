"""A run in progress, and how it is set up from its configuration."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from multifire.config import RunConfig, TrainOptions
from multifire.nn import OwnNetwork, SpikingNetwork, TdBatchNorm2d, model_from_config, require_known
from multifire.training.average import MovingAverage
from multifire.training.captured import TrainingStep, logits_function, why_not_captured
from multifire.training.checkpoint import Position
from multifire.training.data import RunBatches, load_batches
from multifire.training.distributed import Processes, device_name, was_restarted
from multifire.training.optim import make_optimizer, prepare_own_optimizer
from multifire.training.own import NOTHING_OWN, Own
from multifire.training.run_folder import RunFolder
from multifire.training.signals import Requests
from multifire.utils.device import pick_device
from multifire.utils.files import check_free_space
from multifire.utils.log import log


@dataclass
class Training:
    """A run in progress: its configuration, data, network, optimiser and position."""

    cfg: RunConfig
    options: TrainOptions
    run: RunFolder
    processes: Processes
    batches: RunBatches
    model: SpikingNetwork
    network: nn.Module
    """The model or, with several processes, its DistributedDataParallel wrapper."""
    optimizer: torch.optim.Optimizer
    average: MovingAverage[SpikingNetwork] | None
    """Moving average of the weights; None without `optim.ema_decay`."""
    position: Position
    requests: Requests
    do_step: TrainingStep
    """Does a training step: on a GPU as a CUDA graph, if that is possible."""
    logits: Callable[[Tensor], Tensor]
    """Computes the logits of `scored_model`: on a GPU as a CUDA graph."""
    own: Own
    """What the user has replaced."""

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
        return "samples" if self.batches.info.events else "images"

    @property
    def scored_model(self) -> SpikingNetwork:
        """The network that is scored and saved as best: the moving average of the weights, or else the model."""
        return self.model if self.average is None else self.average.module

    @property
    def is_finished(self) -> bool:
        """True if all epochs are done, or if `optim.patience` epochs in a row brought no better accuracy."""
        position, optim = self.position, self.cfg.optim
        since_best = 0 if position.best_epoch is None else position.epoch - 1 - position.best_epoch
        return position.epoch >= optim.epochs or (optim.patience is not None and since_best >= optim.patience)


def set_up(
    cfg: RunConfig,
    folder: Path,
    options: TrainOptions,
    processes: Processes,
    requests: Requests,
    own: Own = NOTHING_OWN,
) -> Training:
    """Load the data of a run, and build its network and optimiser, unless they are in `own`."""
    device = pick_device(device_name(cfg.device))
    cfg = scale_to_processes(cfg, processes.world)
    batches = load_batches(cfg, device, processes, own.data)
    cfg = batches.cfg
    torch.manual_seed(cfg.seed)
    model = build_network(cfg, own).to(device)
    if cfg.optim.spike_penalty:
        require_known(model, "optim.spike_penalty")
    for norm in model.modules():
        if isinstance(norm, TdBatchNorm2d):
            norm.sync = cfg.sync_norm and processes.world > 1
    network = processes.wrap(model, share_buffers=not cfg.sync_norm)
    average = None if cfg.optim.ema_decay is None else MovingAverage(model, cfg.optim.ema_decay)
    optimizer = make_optimizer(model, cfg.optim) if own.optimizer is None else own.optimizer(model.parameters())
    if own.optimizer is not None:
        prepare_own_optimizer(optimizer, captured=device.type == "cuda")
    on_gpu = device.type == "cuda" and options.cuda_graphs == "auto"
    reason = why_not_captured(cfg, processes)
    if on_gpu and reason:
        log.info("training steps run without a CUDA graph: %s", reason)
    captured = on_gpu and reason is None
    parts = {"processes": processes, "average": average, "loss": own.loss}
    do_step = TrainingStep(network, optimizer, cfg, **parts, captured=captured)
    logits = logits_function(average.module if average else model, cfg.precision, captured=on_gpu)
    return Training(
        cfg, options, RunFolder(folder), processes, batches, model, network, optimizer, average, Position(), requests,
        do_step, logits, own,
    )  # fmt: skip


def build_network(cfg: RunConfig, own: Own) -> SpikingNetwork:
    """Return the network of the configuration, or the user's with the interface that training uses."""
    if own.network is None:
        return model_from_config(cfg.model, cfg.backend)
    if isinstance(own.network, SpikingNetwork):
        for name in ("in_channels", "num_classes"):
            found, expected = getattr(own.network, name), getattr(cfg.model, name)
            if found != expected:
                raise ValueError(f"the network has {name} = {found}, expected {expected}, as the data have")
        return own.network
    return cast(SpikingNetwork, OwnNetwork(own.network, cfg.model.num_classes, type(own.network).__name__))


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
