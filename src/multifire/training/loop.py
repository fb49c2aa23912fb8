"""The training loop: `train`, and the functions that train an epoch and evaluate it."""

from pathlib import Path
from typing import Any

from multifire.analysis.evaluate import Evaluation, evaluate
from multifire.config import RunConfig, TrainOptions
from multifire.training.distributed import process_group
from multifire.training.guards import (
    CheckpointTimer,
    Watchdog,
    check_loss_finite,
    explain_out_of_memory,
    save_and_stop_if_asked,
    stop_if_asked,
)
from multifire.training.messages import TrainingBar, epoch_line, show_header
from multifire.training.meter import Meter
from multifire.training.optim import set_learning_rate
from multifire.training.own import NOTHING_OWN, Own
from multifire.training.records import epoch_figures, record_epoch, selection_split, summarise
from multifire.training.resume import restore_if_resuming, save_best, save_last
from multifire.training.signals import catch_signals
from multifire.training.state import Training, open_run_folder, set_up
from multifire.utils.files import explain_full_disk
from multifire.utils.memory import return_freed_memory

FULL_DISK = "make room, then give --resume to continue the run"


def train(cfg: RunConfig, out: Path, options: TrainOptions | None = None, own: Own = NOTHING_OWN) -> dict[str, Any]:
    """Train the network of `cfg` on its data, write the run into the folder `out`, and return its summary.

    Args:
        cfg: the configuration. With the kind of device and the number of processes it decides every computed number.
        out: the run's folder.
        options: resuming ("yes" or "auto" continues the newest checkpoint in `out`), checkpoints, time limit, trackers;
            they do not change what is computed.
        own: a network, data, a loss, an optimiser or a function of the user, in place of the configuration's.

    Raises:
        ValueError: the configuration, the data or a checkpoint is not usable.
        FileNotFoundError: the data or the run to resume are missing.
        FileExistsError: `out` is not empty and `options.resume` is "no", or another process trains in it.
        FloatingPointError: a loss or a gradient is NaN or infinite, more often than `optim.skip_nonfinite` allows; the
            last good checkpoint is kept.
        MemoryError: a training step or an evaluation needs too much memory; the message names a size that fits.
        OSError: the disk is full.
        Interrupted: SIGINT, SIGTERM or `options.max_time` stopped the run; its last checkpoint holds all finished
            steps.
    """
    with catch_signals() as requests, process_group() as processes:
        training = set_up(cfg, out, options or TrainOptions(), processes, requests, own)
        with explain_full_disk(out, FULL_DISK), open_run_folder(training):
            restore_if_resuming(training)
            show_header(training)
            with TrainingBar(training) as bar, Watchdog() as watchdog:
                while not training.is_finished:
                    train_epoch(training, bar, watchdog)
                    finish_epoch(training, bar, watchdog)
            return summarise(training)


def train_epoch(training: Training, bar: TrainingBar, watchdog: Watchdog) -> None:
    """Train from the current position to the end of the epoch."""
    cfg, position, batches = training.cfg, training.position, training.batches.train
    meter, timer = Meter(training), CheckpointTimer(training.options)
    for x_TNCHW, y in batches.epoch(position.epoch, position.step):
        set_learning_rate(training.optimizer, cfg.optim, training.step, training.steps_per_epoch)
        samples = batches.order.size(position.step)
        with explain_out_of_memory(training, x_TNCHW, y):
            result = training.do_step(x_TNCHW, y, samples)
        meter.add(result)
        position.step += 1
        bar.step_finished(meter.figures())
        step_name = f"{bar.epoch_name}, step {position.step}"
        watchdog.progress(step_name)
        save_and_stop_if_asked(training, meter, timer, f"at {step_name}")
    meter.flush()


def finish_epoch(training: Training, bar: TrainingBar, watchdog: Watchdog) -> None:
    """Score the network, record the epoch, move to the next one, and write the checkpoints."""
    position = training.position
    scored = score(training, bar, watchdog)
    check_loss_finite(training, scored.loss, selection_split(training.cfg))
    figures = epoch_figures(training, scored)
    is_best = position.best is None or scored.accuracy > position.best
    if is_best:
        position.best, position.best_epoch = scored.accuracy, position.epoch
    bar.say(epoch_line(training, figures))
    record_epoch(training, scored, figures)
    if training.own.on_epoch and training.processes.is_first:
        training.own.on_epoch({"epoch": position.epoch, **figures})
    position.finish_epoch()
    if is_best:
        save_best(training)
    save_last(training)
    return_freed_memory()


def score(training: Training, bar: TrainingBar, watchdog: Watchdog) -> Evaluation:
    """Score the network on the split that chooses the best epoch: validation if there is one, else test."""
    evaluation_name = f"the evaluation after {bar.epoch_name}"

    def on_batch() -> None:
        bar.batch_scored()
        watchdog.progress(f"a batch of {evaluation_name}")
        # The checkpoint after the last step of the epoch is written, so a stop here loses no training.
        stop_if_asked(training, f"in {evaluation_name}")

    return evaluate(
        training.scored_model,
        training.batches.selection,
        training.cfg.precision,
        on_batch,
        total=training.processes.total,
        logits=training.logits,
    )
