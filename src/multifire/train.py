"""The training loop: `train` is the whole of it, the functions below it are its steps, in order."""

import contextlib
import math
import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from multifire import datasets, ops
from multifire.analysis import analyze
from multifire.checkpoint import (
    Checkpoint,
    Position,
    check_keys,
    load_checkpoint,
    load_newest,
    load_weights,
    save_checkpoint,
)
from multifire.config import DataConfig, OptimConfig, RunConfig, TrainOptions, seconds
from multifire.datasets.loader import Batches, EventBatches, make_batches
from multifire.evaluate import Evaluation, evaluate
from multifire.nn import SpikingResNet, TdBatchNorm2d, model_from_config
from multifire.optim import SGD
from multifire.processes import ALONE, Processes, device_name, joined, restarted
from multifire.progress import Bar, format_seconds
from multifire.runs import RunFolder
from multifire.runtime import (
    Signals,
    Watchdog,
    autocast,
    check_room,
    describe_machine,
    full_disk_explained,
    give_back_memory,
    listening,
    log,
    pick_device,
    ran_out,
    step_done,
)
from multifire.schedule import learning_rate

START = time.monotonic()
"""When the process began, near enough: --max-time counts from here."""
DIVERGED = "the last good checkpoint is kept, if there was one; a lower --optim.lr or --optim.clip-norm 1 may help"


class Interrupted(Exception):
    """The run was asked to stop; its `last` checkpoint holds everything up to there."""

    def __init__(self, message: str, exit_code: int):
        super().__init__(message)
        self.exit_code = exit_code


@dataclass
class Training:
    """A run under way."""

    cfg: RunConfig
    options: TrainOptions
    run: RunFolder
    processes: Processes
    batches: dict[str, Batches | EventBatches]
    model: SpikingResNet
    network: nn.Module
    """The model or, among many processes, what averages its gradients over them."""
    optimizer: torch.optim.Optimizer
    average: AveragedModel | None
    position: Position
    asked: Signals

    @property
    def steps(self) -> int:
        """Steps in an epoch."""
        return len(self.batches["train"])

    @property
    def scored(self) -> SpikingResNet:
        """The network that is evaluated and shared: the weights' moving average, where there is one."""
        return self.model if self.average is None else cast(SpikingResNet, self.average.module)


def train(cfg: RunConfig, out: Path, options: TrainOptions | None = None) -> dict[str, Any]:
    """Train the network of `cfg` on its data, leave a run in the folder `out`, and return the run's summary.

    Raises:
        ValueError, FileNotFoundError: bad configuration, data or checkpoint.
        FileExistsError: `out` holds something that is not to be resumed, or another process trains in it.
        FloatingPointError: a loss or a gradient is NaN or infinite; the checkpoint before it is kept.
        MemoryError: a training step does not fit, and what would; or an evaluation does not.
        OSError: the disk is full.
        Interrupted: SIGINT, SIGTERM or options.max_time, after a checkpoint.
    """
    with listening() as asked, joined() as processes:
        training = set_up(cfg, RunFolder(out), options or TrainOptions(), processes, asked)
        with full_disk_explained(out), opened(training):
            restore(training)
            done = training.position.epoch * training.steps + training.position.step
            with Bar("training", cfg.optim.epochs * training.steps, done) as bar, Watchdog() as watchdog:
                while not finished(training):
                    train_epoch(training, bar, watchdog)
                    finish_epoch(training, bar, watchdog)
            return summarise(training)


def set_up(cfg: RunConfig, run: RunFolder, options: TrainOptions, processes: Processes, asked: Signals) -> Training:
    """Data, network and optimiser of a run that is to begin."""
    device = pick_device(device_name(cfg.device))
    if cfg.optim.scaling == "linear":
        optim = replace(cfg.optim, lr=cfg.optim.lr * processes.world, batch_size=cfg.optim.batch_size * processes.world)
        cfg = replace(cfg, optim=optim)
    batches = load_batches(cfg, device, processes)
    torch.manual_seed(cfg.seed)
    model = model_from_config(cfg.model, cfg.backend).to(device)
    for norm in model.modules():
        if isinstance(norm, TdBatchNorm2d):
            norm.sync = cfg.sync_norm and processes.world > 1
    network = processes.averaging(model, share_buffers=not cfg.sync_norm)
    average = None
    if cfg.optim.ema_decay is not None:
        average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(cfg.optim.ema_decay), use_buffers=True)
    optimizer = make_optimizer(model, cfg.optim)
    return Training(cfg, options, run, processes, batches, model, network, optimizer, average, Position(), asked)


def make_optimizer(model: nn.Module, optim: OptimConfig) -> torch.optim.Optimizer:
    """SGD over the model's parameters."""
    groups = parameter_groups(model, optim)
    return SGD(groups, optim.lr, optim.momentum, optim.weight_decay)


def parameter_groups(model: nn.Module, optim: OptimConfig) -> list[dict[str, Any]]:
    """All parameters alike or, without `decay_norms`, the norms' weights and all biases apart, which do not decay."""
    if optim.decay_norms:
        return [{"params": list(model.parameters())}]
    decaying = [p for p in model.parameters() if p.dim() > 1]
    return [{"params": decaying}, {"params": [p for p in model.parameters() if p.dim() <= 1], "weight_decay": 0.0}]


@contextlib.contextmanager
def opened(training: Training) -> Iterator[None]:
    """The run's folder, in the first process's hands; the others wait until it is ready."""
    with contextlib.ExitStack() as stack:
        if training.processes.first:
            size = 3 * sum(tensor.nbytes for tensor in training.model.state_dict().values())
            run, options = training.run, training.options
            resume = options.resume == "yes" or ((options.resume == "auto" or restarted()) and run.exists())
            check_room(run.path, size)
            stack.enter_context(run.opened(training.cfg, resume, options.track))
        training.processes.wait()
        yield


def finished(training: Training) -> bool:
    """Whether all epochs are over, or too many of them brought nothing better."""
    position, optim = training.position, training.cfg.optim
    waited = 0 if position.best_epoch is None else position.epoch - 1 - position.best_epoch
    return position.epoch >= optim.epochs or (optim.patience is not None and waited >= optim.patience)


def load_batches(
    cfg: RunConfig, device: torch.device, processes: Processes = ALONE
) -> dict[str, Batches | EventBatches]:
    """Batches to "train" on, to "choose" the best epoch by (validation if there is one, else test), and to "test".

    And "few to choose" in every epoch, "few to test" at the end: the samples of those that are looked at closely.
    """
    data = datasets.load(cfg.data.name, cfg.data.root, cfg.data)
    check_fits(cfg, data)
    training, choosing = data.train, data.test
    if cfg.data.validation:
        training, choosing = datasets.hold_out(data.train, cfg.data.validation, cfg.seed)
    if cfg.data.limit:
        training = datasets.take(training, cfg.data.limit, cfg.seed)
    shared: dict[str, Any] = {"device": device, "processes": processes.place}
    scoring = {**shared, "batch_size": cfg.eval_batch_size, "shuffle": False}
    few = few_samples(len(training))
    fitting = max(1, cfg.optim.batch_size // (cfg.optim.accumulate * processes.world))  # as much as a step computes
    looking = {"device": device, "batch_size": min(few, fitting), "shuffle": False}
    return {
        "train": make_batches(
            training, data.info, cfg.data, batch_size=cfg.optim.batch_size, shuffle=True, seed=cfg.seed, **shared
        ),
        "choose": make_batches(choosing, data.info, cfg.data, **scoring),
        "test": make_batches(data.test, data.info, cfg.data, **scoring),
        "few to choose": make_batches(datasets.take(choosing, few, cfg.seed), data.info, cfg.data, **looking),
        "few to test": make_batches(datasets.take(data.test, 4 * few, cfg.seed), data.info, cfg.data, **looking),
    }


def few_samples(trained: int) -> int:
    """How many samples to analyse: few enough that it takes less than a twentieth of the epoch that trained so many."""
    return max(4, min(trained // 500, 100))


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


def restore(training: Training) -> None:
    """Put the run's newest whole checkpoint in place, if there is one; the first process reads it for all."""
    run, found = training.run, None
    if training.processes.first and run.exists():
        found = load_newest(run.last)
        if found is None and run.metrics():
            raise FileNotFoundError(f"{run.last} is missing; put it back from a copy, or give --out for another folder")
        run.forget_from(found[0].position.epoch if found else 0)
    found = training.processes.same(found)
    if found is None:
        return
    checkpoint, file = found
    model, source = training.model, str(file)
    load_weights(model, checkpoint.model, source)
    parameters = dict(model.named_parameters())
    if checkpoint.optimizer:
        check_keys(checkpoint.optimizer, {name: p.shape for name, p in parameters.items()}, f"{source}: momentum")
    for name, momentum in checkpoint.optimizer.items():
        buffer = torch.empty_like(parameters[name]).copy_(momentum)
        training.optimizer.state[parameters[name]]["momentum_buffer"] = buffer
    if training.average:
        load_weights(training.scored, checkpoint.average, f"{source}: moving average")
        training.average.n_averaged.fill_(1)  # more than none: else the next step's weights would replace it
    training.position = checkpoint.position
    log.info("going on from %s: epoch %d, step %d", file, training.position.epoch + 1, training.position.step)


def train_epoch(training: Training, bar: Bar, watchdog: Watchdog) -> None:
    """Train from the position to the end of its epoch, moving it along."""
    cfg, position, batches = training.cfg, training.position, training.batches["train"]
    meter = Meter(training)
    due = Due(training.options)
    title = f"epoch {position.epoch + 1}/{cfg.optim.epochs}"
    for x_TNCHW, y in batches.epoch(position.epoch, position.step):
        step = position.epoch * training.steps + position.step
        for group in training.optimizer.param_groups:
            group["lr"] = learning_rate(cfg.optim, step, training.steps)
        samples = batches.order.size(position.step)
        with memory_explained(training, x_TNCHW, y):
            meter.add(train_step(training.network, training.optimizer, x_TNCHW, y, cfg, samples, training.processes))
        if training.average:
            training.average.update_parameters(training.model)
        bar.update(step + 1, meter.figures(), title)
        watchdog.stepped(f"{title}, step {position.step}")
        look_for_requests(training, meter, due, title)
    meter.flush()


class Step(NamedTuple):
    """What a step of gradient descent leaves, on the device."""

    sums: Tensor
    """Loss, right predictions and samples, float64 [3], added up over this process's samples."""
    norms: Tensor
    """Norm of each parameter's gradient."""


def train_step(
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    x_TNCHW: Tensor,
    y: Tensor,
    cfg: RunConfig,
    samples: int | None = None,
    processes: Processes = ALONE,
) -> Step:
    """One step of gradient descent on this process's part of a batch of `samples`."""
    optimizer.zero_grad(set_to_none=True)
    share = processes.world / (len(y) if samples is None else samples)  # gradients are averaged over processes
    buffers = [b.clone() for b in network.buffers()] if cfg.optim.skip_nonfinite else []
    sums = torch.zeros(3, dtype=torch.float64, device=y.device)
    parts = range(cfg.optim.accumulate)
    for part in parts:
        own = slice(len(y) * part // len(parts), len(y) * (part + 1) // len(parts))
        apart = isinstance(network, DistributedDataParallel) and part + 1 < len(parts)
        with cast(DistributedDataParallel, network).no_sync() if apart else contextlib.nullcontext():
            sums += add_gradients(network, x_TNCHW[:, own], y[own], cfg, share)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    norms = torch.stack(torch._foreach_norm([p.grad for p in parameters]))
    total = norms.norm()
    if cfg.optim.clip_norm is not None:
        nn.utils.clip_grads_with_norm_(parameters, cfg.optim.clip_norm, total)
    if not cfg.optim.skip_nonfinite or math.isfinite(total.item()):
        optimizer.step()
    else:
        for buffer, before in zip(network.buffers(), buffers, strict=True):
            buffer.copy_(before)
    step_done()
    return Step(sums, norms)


def add_gradients(network: nn.Module, x_TNCHW: Tensor, y: Tensor, cfg: RunConfig, share: float) -> Tensor:
    """Add share·∇(sum of losses) to the gradients; the sums of a Step."""
    # A process without a sample has no statistics of its own; it takes part all the same, for the others wait for it.
    network.train(len(y) > 0 or cfg.sync_norm)
    with autocast(x_TNCHW.device, cfg.precision):
        logits_TNK = network(x_TNCHW, per_step=True)
    logits_TNK = logits_TNK.to(torch.promote_types(logits_TNK.dtype, torch.float32))
    loss = loss_of(logits_TNK, y, cfg.optim)
    (loss * share).backward()
    right = logits_TNK.detach().mean(0).argmax(1).eq(y).sum()
    return torch.stack([loss.detach().double(), right.double(), right.new_tensor(len(y)).double()])


def loss_of(logits_TNK: Tensor, y: Tensor, optim: OptimConfig) -> Tensor:
    """Sum over samples of the cross entropy of the mean logits or, for TET, of the mean over steps of each step's.

    Source of TET: Deng et al., ICLR 2022.
    """
    if optim.loss == "tet":
        steps = len(logits_TNK)
        each = F.cross_entropy(
            logits_TNK.flatten(0, 1), y.repeat(steps), reduction="sum", label_smoothing=optim.label_smoothing
        )
        return each / steps
    return F.cross_entropy(logits_TNK.mean(0), y, reduction="sum", label_smoothing=optim.label_smoothing)


class Meter:
    """Adds up an epoch's figures in the position, looking at a step's results only once the next one is under way.

    Reading a tensor waits for the device; read one step late, it has long been computed.
    """

    def __init__(self, training: Training):
        self._training = training
        self.position = training.position
        self._pending: Step | None = None
        self._since = time.monotonic()
        self._start = (self.position.seen, self.position.epoch_seconds)

    def add(self, step: Step) -> None:
        self.flush()
        self._pending = Step(self._training.processes.total(step.sums), step.norms)
        self.position.step += 1

    def flush(self) -> None:
        """Take in the step that is still pending.

        Raises:
            FloatingPointError: its loss or gradient is NaN or infinite, and no such step may be left out any more.
        """
        if self._pending is None:
            return
        (sums, norms), self._pending = self._pending, None
        loss, right, count = sums.tolist()
        position = self.position
        if math.isfinite(loss) and torch.isfinite(norms).all():
            position.loss_sum += loss
            position.correct += int(right)
            position.seen += int(count)
        else:
            self._refuse(loss / count, norms.tolist())
        now = time.monotonic()
        position.epoch_seconds += now - self._since
        self._since = now

    def _refuse(self, loss: float, norms: Sequence[float]) -> None:
        position, training = self.position, self._training
        where = f"epoch {position.epoch + 1}, step {position.step}"
        names = {id(parameter): name for name, parameter in training.model.named_parameters()}
        order = [names[id(p)] for group in training.optimizer.param_groups for p in group["params"]]
        layers = dict(zip(order, norms, strict=True))
        bad = next((name for name, norm in layers.items() if not math.isfinite(norm)), "none")
        position.skipped += 1
        if position.skipped <= training.cfg.optim.skip_nonfinite:
            log.warning("%s left out: loss %s, first gradient that is not finite: %s", where, loss, bad)
            return
        log.error(
            "norm of each gradient at %s: %s", where, ", ".join(f"{name} {norm:.3g}" for name, norm in layers.items())
        )
        raise FloatingPointError(
            f"the loss is {loss} at {where}, and the first gradient that is not finite: {bad}; {DIVERGED}"
        )

    def figures(self) -> str:
        p = self.position
        if p.seen == self._start[0]:
            return ""
        rate = (p.seen - self._start[0]) / (p.epoch_seconds - self._start[1])
        return f"loss {p.loss_sum / p.seen:.4f}  acc {100 * p.correct / p.seen:5.2f} %  {rate:,.0f} images/s"


class Due:
    """When the next checkpoint within an epoch is due."""

    def __init__(self, options: TrainOptions):
        every = options.checkpoint_every
        self._steps = int(every) if every.isdecimal() else None
        self._seconds = math.inf if self._steps else seconds(every, "checkpoint_every")
        self._since = time.monotonic()

    def __call__(self, step: int) -> bool:
        if self._steps:
            return step % self._steps == 0
        if time.monotonic() - self._since < self._seconds:
            return False
        self._since = time.monotonic()
        return True


def look_for_requests(training: Training, meter: Meter, due: Due, title: str) -> None:
    """Between two steps: write a checkpoint where one is asked for or due, and stop where that is asked for.

    All processes do the same, whichever of them was asked. An epoch's last step is always followed by a checkpoint:
    its evaluation may take long, and a stop or a crash in it costs no training.
    """
    asked, position = training.asked, training.position
    own = asked.save or position.step == training.steps or (training.processes.first and due(position.step))
    asked.save = False
    stop, save = asked_for(training, own)
    if stop is None and not save:
        return
    meter.flush()
    check_finite(training.model, position)
    save_last(training)
    if stop is not None:
        raise stopped(training, f"at {title}, step {position.step}", stop)


def asked_for(training: Training, save: bool = False) -> tuple[int | None, bool]:
    """The exit code to stop with, if a signal or the time says so; whether to `save`. The same in all processes."""
    asked, limit = training.asked, training.options.max_time
    late = limit is not None and time.monotonic() - START > seconds(limit, "max_time")
    interrupt, terminate, late, save = training.processes.any_of(
        [asked.stop == signal.SIGINT, asked.stop == signal.SIGTERM, late, save]
    )
    return 128 + signal.SIGTERM if terminate else 128 + signal.SIGINT if interrupt else 0 if late else None, save


def stopped(training: Training, where: str, exit_code: int) -> Interrupted:
    return Interrupted(f"stopped {where}; {training.run.last} has it: give --resume to go on", exit_code)


def save_last(training: Training) -> None:
    """Write the run as it stands, which `check_finite` has found sound, and keep the ones before it."""
    if training.processes.first:
        save_checkpoint(training.run.last, snapshot(training), training.options.keep)


@contextlib.contextmanager
def memory_explained(training: Training, x_TNCHW: Tensor, y: Tensor) -> Iterator[None]:
    """Where memory runs out, say for which batch, and which would fit."""
    try:
        yield
        return
    except (MemoryError, RuntimeError) as error:
        if not ran_out(error):
            raise
    batch = training.cfg.optim.batch_size
    message = f"out of memory with --optim.batch-size {batch}"
    if training.processes.world == 1:
        fitting = next((n for n in halves(len(y)) if fits(training, x_TNCHW[:, :n], y[:n])), None)
        if fitting is None:
            raise MemoryError(f"{message}, and not even a single sample fits; choose a smaller network")
        message += (
            f"; {fitting} fit: give --optim.batch-size {fitting}, or "
            f"--optim.accumulate {-(-batch // fitting)}, which computes the batch in parts of that size"
        )
    raise MemoryError(message)


def halves(samples: int) -> Iterator[int]:
    while samples > 1:
        samples //= 2
        yield samples


def fits(training: Training, x_TNCHW: Tensor, y: Tensor) -> bool:
    """Whether the gradients of so many samples can be computed."""
    training.optimizer.zero_grad(set_to_none=True)
    try:
        add_gradients(training.model, x_TNCHW, y, training.cfg, 1.0)
    except (MemoryError, RuntimeError) as error:
        if not ran_out(error):
            raise
        return False
    return True


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


def finish_epoch(training: Training, bar: Bar, watchdog: Watchdog) -> None:
    """Score the network, record the epoch's figures, move on to the next, and write the checkpoints."""
    cfg, position, run = training.cfg, training.position, training.run

    def on_batch() -> None:
        watchdog.stepped(f"a batch of the evaluation after epoch {position.epoch + 1}")
        stop, _ = asked_for(training)
        if stop is not None:
            raise stopped(training, f"in the evaluation after epoch {position.epoch + 1}", stop)

    scored = evaluate(training.scored, training.batches["choose"], cfg.precision, on_batch, training.processes)
    if not math.isfinite(scored.loss):
        raise FloatingPointError(
            f"the {chooser(cfg)} loss is {scored.loss} after epoch {position.epoch + 1}; {DIVERGED}"
        )
    figures = epoch_figures(training, scored)
    better = position.best is None or scored.accuracy > position.best
    if better:
        position.best, position.best_epoch = scored.accuracy, position.epoch
    if training.processes.first:
        run.record(position.epoch, figures)
    bar.say(
        f"epoch {position.epoch + 1}/{cfg.optim.epochs}  "
        f"train loss {figures['train_loss']:.4f}  acc {100 * figures['train_accuracy']:.2f} %   "
        f"{chooser(cfg)} loss {scored.loss:.4f}  acc {100 * scored.accuracy:.2f} %   "
        f"{figures['images_per_second']:,.0f} images/s  {format_seconds(position.epoch_seconds)}"
    )
    every = training.options.analyze_every
    due = training.processes.first and every and (position.epoch + 1) % every == 0
    if due and (found := analyse(training, "few to choose", scored)):
        run.record_analysis(position.epoch, {"split": chooser(cfg), **found})
    position.train_seconds += position.epoch_seconds
    position.images += position.seen
    position.epoch, position.step = position.epoch + 1, 0
    position.loss_sum, position.correct, position.seen, position.epoch_seconds = 0.0, 0, 0, 0.0
    if better and training.processes.first:
        save_checkpoint(run.best, Checkpoint(cfg, position, training.scored.state_dict(), {}))
    save_last(training)
    give_back_memory()  # an evaluation's batches have other sizes


def analyse(training: Training, few: str, scored: Evaluation) -> dict[str, Any] | None:
    """The scored network, looked at closely; None where that cannot be done, which is no reason to stop."""
    cfg = training.cfg
    try:
        batches = list(training.batches[few].epoch(0))
        loss = partial(loss_of, optim=cfg.optim)
        return analyze(training.scored, batches, loss=loss, precision=cfg.precision, scored=scored).record()
    except FloatingPointError as error:
        log.warning("epoch %d not analysed: %s", training.position.epoch + 1, error)
        return None


def epoch_figures(training: Training, scored: Evaluation) -> dict[str, Any]:
    """An epoch's record in metrics.jsonl."""
    position, choosing = training.position, chooser(training.cfg)
    seen = max(position.seen, 1)  # every step may have been left out
    last_step = (position.epoch + 1) * training.steps - 1  # which an earlier process may have trained
    return {
        "train_loss": position.loss_sum / seen,
        "train_accuracy": position.correct / seen,
        f"{choosing}_loss": scored.loss,
        f"{choosing}_accuracy": scored.accuracy,
        f"{choosing}_accuracy_per_step": scored.per_step,
        "lr": learning_rate(training.cfg.optim, last_step, training.steps),
        "seconds": position.epoch_seconds,
        "images_per_second": position.seen / position.epoch_seconds,
    }


def chooser(cfg: RunConfig) -> str:
    """Name of the split that the best epoch is chosen by."""
    return "validation" if cfg.data.validation else "test"


def snapshot(training: Training) -> Checkpoint:
    """The run as it stands, to be written at once: the tensors are the live ones."""
    states = {name: training.optimizer.state[parameter] for name, parameter in training.model.named_parameters()}
    momentum = {name: state["momentum_buffer"] for name, state in states.items() if "momentum_buffer" in state}
    average = training.average.module.state_dict() if training.average else {}
    return Checkpoint(training.cfg, training.position, training.model.state_dict(), momentum, average)


def summarise(training: Training) -> dict[str, Any]:
    """Score the finished network on the test set, and write summary.json and analysis.json.

    The headline is the best checkpoint's accuracy where it was chosen on held-out training images, and the last one's
    where it could only have been chosen by the test set itself.
    """
    cfg, position, processes = training.cfg, training.position, training.processes
    model = training.scored
    last = evaluate(model, training.batches["test"], cfg.precision, processes=processes)
    headline, which = last, "last"
    if cfg.data.validation:
        best = processes.same(load_checkpoint(training.run.best).model if processes.first else None)
        load_weights(model, best, source=str(training.run.best))
        headline = evaluate(model, training.batches["test"], cfg.precision, processes=processes)
        which = "best by validation"
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
        "skipped_steps": position.skipped,
        "parameters": sum(p.numel() for p in model.parameters()),
        "train_seconds": position.train_seconds,
        "images_per_second": position.images / max(position.train_seconds, 1e-9),
        "processes": processes.world,
        "machine": describe_machine(next(model.parameters()).device),
        "backends": ops.backends_used(),
        "config": asdict(cfg),
    }
    if processes.first:
        if training.options.analyze_every and (found := analyse(training, "few to test", headline)):
            training.run.conclude({"split": "test", "checkpoint": which, **found})
        training.run.summarise(summary)
    return summary
