"""The training loop: `train` is the whole of it, the functions below it are its steps, in order."""

import math
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from multifire import datasets, ops
from multifire.checkpoint import Checkpoint, Position, check_keys, load_checkpoint, load_weights, save_checkpoint
from multifire.config import DataConfig, OptimConfig, RunConfig
from multifire.datasets.loader import Batches, EventBatches, make_batches
from multifire.evaluate import Evaluation, evaluate
from multifire.nn import SpikingResNet, model_from_config
from multifire.progress import Bar, format_seconds
from multifire.runs import RunFolder
from multifire.runtime import StopRequest, autocast, describe_machine, pick_device, stop_on_interrupt
from multifire.schedule import learning_rate

DIVERGED = "the last good checkpoint is kept, if there was one; a lower --optim.lr or --optim.clip-norm 1 may help"


class Interrupted(Exception):
    """Ctrl-C; the run's `last` checkpoint holds everything up to the step before it."""


def train(cfg: RunConfig, out: Path, resume: bool = False) -> dict[str, Any]:
    """Train the network of `cfg` on its data, leave a run in the folder `out`, and return the run's summary.

    Raises:
        ValueError, FileNotFoundError: bad configuration, data or checkpoint.
        FileExistsError: `out` holds something, and `resume` is False.
        FloatingPointError: the loss is NaN or infinite; the checkpoint before it is kept.
        Interrupted: Ctrl-C, after a checkpoint.
    """
    device = pick_device(cfg.device)
    batches = load_batches(cfg, device)
    torch.manual_seed(cfg.seed)
    model = model_from_config(cfg.model, cfg.backend).to(device)
    optimizer = torch.optim.SGD(
        model.parameters(), cfg.optim.lr, cfg.optim.momentum, weight_decay=cfg.optim.weight_decay, fused=True
    )
    run = RunFolder(out)
    run.start(cfg, resume)
    position = restore(run, model, optimizer) if resume else Position()
    steps = len(batches["train"])
    first = position.epoch * steps + position.step
    with stop_on_interrupt() as stop, Bar("training", cfg.optim.epochs * steps, first) as bar:
        while position.epoch < cfg.optim.epochs:
            train_epoch(model, optimizer, batches["train"], cfg, position, bar, run, stop)
            scored = evaluate(model, batches["choose"], cfg.precision)
            finish_epoch(run, cfg, model, optimizer, position, scored, bar)
    return summarise(run, cfg, model, batches, position)


def load_batches(cfg: RunConfig, device: torch.device) -> dict[str, Batches | EventBatches]:
    """Batches to "train" on, to "choose" the best epoch by (validation if there is one, else test), and to "test"."""
    data = datasets.load(cfg.data.name, cfg.data.root, cfg.data)
    check_fits(cfg, data)
    training, choosing = data.train, data.test
    if cfg.data.validation:
        training, choosing = datasets.hold_out(data.train, cfg.data.validation, cfg.seed)
    if cfg.data.limit:
        training = datasets.take(training, cfg.data.limit, cfg.seed)
    scoring: dict[str, Any] = {"batch_size": cfg.eval_batch_size, "device": device, "shuffle": False}
    return {
        "train": make_batches(
            training, data.info, cfg.data, batch_size=cfg.optim.batch_size, device=device, shuffle=True, seed=cfg.seed
        ),
        "choose": make_batches(choosing, data.info, cfg.data, **scoring),
        "test": make_batches(data.test, data.info, cfg.data, **scoring),
    }


def check_fits(cfg: RunConfig, data: datasets.Dataset) -> None:
    for field, found, expected in (
        ("model.in_channels", cfg.model.in_channels, data.info.channels),
        ("model.num_classes", cfg.model.num_classes, len(data.info.classes)),
    ):
        if found != expected:
            raise ValueError(f"{field} is {found}, but {data.name} has {expected}; give --{field} {expected}")
    usual = DataConfig()
    others = ("crop_padding",) if data.info.events else ("roll", "rotation", "cutout", "swap_polarity", "time_jitter")
    for name in others:
        if getattr(cfg.data, name) != getattr(usual, name):
            kind = "events" if data.info.events else "images"
            raise ValueError(f"data.{name} is {getattr(cfg.data, name)}, but {data.name} holds {kind}; leave it out")
    if cfg.data.crop_padding > data.info.size:
        raise ValueError(f"data.crop_padding is {cfg.data.crop_padding}, expected at most the image's {data.info.size}")


def restore(run: RunFolder, model: SpikingResNet, optimizer: torch.optim.Optimizer) -> Position:
    """Put the weights, the momentum and the position of the run's `last` checkpoint in place."""
    if not run.last.is_file():
        if run.metrics():
            raise FileNotFoundError(f"{run.last} is missing; put it back from a copy, or give --out for another folder")
        return Position()  # stopped before its first checkpoint
    checkpoint = load_checkpoint(run.last)
    load_weights(model, checkpoint.model, source=str(run.last))
    parameters = dict(model.named_parameters())
    if checkpoint.optimizer:
        check_keys(checkpoint.optimizer, {name: p.shape for name, p in parameters.items()}, f"{run.last}: momentum")
    for name, momentum in checkpoint.optimizer.items():
        buffer = torch.empty_like(parameters[name]).copy_(momentum)
        optimizer.state[parameters[name]]["momentum_buffer"] = buffer
    run.forget_from(checkpoint.position.epoch)
    return checkpoint.position


def train_epoch(
    model: SpikingResNet,
    optimizer: torch.optim.Optimizer,
    batches: Batches | EventBatches,
    cfg: RunConfig,
    position: Position,
    bar: Bar,
    run: RunFolder,
    stop: StopRequest,
) -> None:
    """Train from `position` to the end of its epoch, moving it along."""
    model.train()
    meter = Meter(position)
    for x_TNCHW, y in batches.epoch(position.epoch, position.step):
        step = position.epoch * len(batches) + position.step
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(cfg.optim, step, len(batches))
        loss, correct = train_step(model, optimizer, x_TNCHW, y, cfg)
        meter.add(loss, correct, len(y))
        title = f"epoch {position.epoch + 1}/{cfg.optim.epochs}"
        bar.update(step + 1, meter.figures(), title)
        if stop:
            meter.flush()
            check_finite(model, position)
            save_checkpoint(run.last, snapshot(cfg, model, optimizer, position))
            raise Interrupted(f"stopped at {title}, step {position.step}; {run.last} has it: give --resume to go on")
    meter.flush()


def train_step(
    model: SpikingResNet, optimizer: torch.optim.Optimizer, x_TNCHW: Tensor, y: Tensor, cfg: RunConfig
) -> tuple[Tensor, Tensor]:
    """One step of gradient descent; the loss and the number of right predictions, still on the device."""
    with autocast(x_TNCHW.device, cfg.precision):
        logits_TNK = model(x_TNCHW, per_step=True).float()
    loss = loss_of(logits_TNK, y, cfg.optim)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    if cfg.optim.clip_norm is not None:
        torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.optim.clip_norm)
    optimizer.step()
    return loss.detach(), logits_TNK.detach().mean(0).argmax(1).eq(y).sum()


def loss_of(logits_TNK: Tensor, y: Tensor, optim: OptimConfig) -> Tensor:
    """Cross entropy of the mean logits or, for TET (Deng et al., ICLR 2022), the mean of every step's cross entropy."""
    if optim.loss == "tet":
        return F.cross_entropy(
            logits_TNK.flatten(0, 1), y.repeat(len(logits_TNK)), label_smoothing=optim.label_smoothing
        )
    return F.cross_entropy(logits_TNK.mean(0), y, label_smoothing=optim.label_smoothing)


class Meter:
    """Adds up an epoch's figures in `position`, looking at a step's results only once the next one is under way.

    Reading a tensor waits for the device; read one step late, it has long been computed.
    """

    def __init__(self, position: Position):
        self.position = position
        self._pending: tuple[Tensor, Tensor, int] | None = None
        self._since = time.monotonic()
        self._start = (position.seen, position.epoch_seconds)

    def add(self, loss: Tensor, correct: Tensor, count: int) -> None:
        self.flush()
        self._pending = (loss, correct, count)
        self.position.step += 1

    def flush(self) -> None:
        """Take in the step that is still pending.

        Raises:
            FloatingPointError: its loss is NaN or infinite.
        """
        if self._pending is None:
            return
        (loss, correct, count), self._pending = self._pending, None
        value, position = loss.item(), self.position
        if not math.isfinite(value):
            raise FloatingPointError(
                f"the loss is {value} at epoch {position.epoch + 1}, step {position.step}; {DIVERGED}"
            )
        position.loss_sum += value * count
        position.correct += int(correct)
        position.seen += count
        now = time.monotonic()
        position.epoch_seconds += now - self._since
        self._since = now

    def figures(self) -> str:
        p = self.position
        if p.seen == self._start[0]:
            return ""
        rate = (p.seen - self._start[0]) / (p.epoch_seconds - self._start[1])
        return f"loss {p.loss_sum / p.seen:.4f}  acc {100 * p.correct / p.seen:5.2f} %  {rate:,.0f} images/s"


def check_finite(model: SpikingResNet, position: Position) -> None:
    """Refuse to go on from weights that are NaN or infinite: a NaN membrane never fires, so the loss need not show it.

    Raises:
        FloatingPointError: names the first such tensor.
    """
    for name, tensor in model.state_dict().items():
        if not torch.isfinite(tensor).all():
            raise FloatingPointError(
                f"{name} holds NaN or infinity at epoch {position.epoch + 1}, step {position.step}; {DIVERGED}"
            )


def finish_epoch(
    run: RunFolder,
    cfg: RunConfig,
    model: SpikingResNet,
    optimizer: torch.optim.Optimizer,
    position: Position,
    scored: Evaluation,
    bar: Bar,
) -> None:
    """Record the epoch's figures, move on to the next, and write the checkpoints."""
    check_finite(model, position)
    if not math.isfinite(scored.loss):
        raise FloatingPointError(
            f"the {chooser(cfg)} loss is {scored.loss} after epoch {position.epoch + 1}; {DIVERGED}"
        )
    figures = {
        "train_loss": position.loss_sum / position.seen,
        "train_accuracy": position.correct / position.seen,
        f"{chooser(cfg)}_loss": scored.loss,
        f"{chooser(cfg)}_accuracy": scored.accuracy,
        f"{chooser(cfg)}_accuracy_per_step": scored.per_step,
        "lr": optimizer.param_groups[0]["lr"],
        "seconds": position.epoch_seconds,
        "images_per_second": position.seen / position.epoch_seconds,
    }
    better = position.best is None or scored.accuracy > position.best
    if better:
        position.best, position.best_epoch = scored.accuracy, position.epoch
    run.record(position.epoch, figures)
    bar.say(
        f"epoch {position.epoch + 1}/{cfg.optim.epochs}  "
        f"train loss {figures['train_loss']:.4f}  acc {100 * figures['train_accuracy']:.2f} %   "
        f"{chooser(cfg)} loss {scored.loss:.4f}  acc {100 * scored.accuracy:.2f} %   "
        f"{figures['images_per_second']:,.0f} images/s  {format_seconds(position.epoch_seconds)}"
    )
    position.train_seconds += position.epoch_seconds
    position.images += position.seen
    position.epoch, position.step = position.epoch + 1, 0
    position.loss_sum, position.correct, position.seen, position.epoch_seconds = 0.0, 0, 0, 0.0
    if better:
        save_checkpoint(run.best, snapshot(cfg, model, None, position))
    save_checkpoint(run.last, snapshot(cfg, model, optimizer, position))


def chooser(cfg: RunConfig) -> str:
    """Name of the split that the best epoch is chosen by."""
    return "validation" if cfg.data.validation else "test"


def snapshot(
    cfg: RunConfig, model: SpikingResNet, optimizer: torch.optim.Optimizer | None, position: Position
) -> Checkpoint:
    """The run as it stands, to be written at once: the tensors are the live ones."""
    momentum = {}
    if optimizer:
        states = {name: optimizer.state[parameter] for name, parameter in model.named_parameters()}
        momentum = {name: state["momentum_buffer"] for name, state in states.items() if "momentum_buffer" in state}
    return Checkpoint(cfg, position, model.state_dict(), momentum)


def summarise(
    run: RunFolder, cfg: RunConfig, model: SpikingResNet, batches: dict[str, Batches | EventBatches], position: Position
) -> dict[str, Any]:
    """Score the finished network on the test set, and write summary.json.

    The headline is the best checkpoint's accuracy where it was chosen on held-out training images, and the last one's
    where it could only have been chosen by the test set itself.
    """
    last = evaluate(model, batches["test"], cfg.precision)
    headline, which = last, "last"
    if cfg.data.validation:
        load_weights(model, load_checkpoint(run.best).model, source=str(run.best))
        headline, which = evaluate(model, batches["test"], cfg.precision), "best by validation"
    summary = {
        "recipe": cfg.recipe,
        "data": cfg.data.name,
        "simulated": datasets.get_info(cfg.data.name).simulated,
        "test_accuracy": headline.accuracy,
        "test_accuracy_of": which,
        "test_loss": headline.loss,
        "last_test_accuracy": last.accuracy,
        "best": {"chosen_by": chooser(cfg), "accuracy": position.best, "epoch": position.best_epoch},
        "per_class": headline.per_class,
        "per_step": headline.per_step,
        "epochs": position.epoch,
        "parameters": sum(p.numel() for p in model.parameters()),
        "train_seconds": position.train_seconds,
        "images_per_second": position.images / max(position.train_seconds, 1e-9),
        "machine": describe_machine(next(model.parameters()).device),
        "backends": ops.backends_used(),
        "config": asdict(cfg),
    }
    run.summarise(summary)
    return summary
