"""Record the figures and the analysis of each epoch, and the summary at the end."""

from dataclasses import asdict
from functools import partial
from typing import Any

from multifire import ops
from multifire.analysis import analyze
from multifire.analysis.evaluate import Evaluation, evaluate
from multifire.config import RunConfig
from multifire.datasets.loader import Batches, EventBatches
from multifire.nn import is_own
from multifire.training.checkpoint import load_checkpoint, load_weights
from multifire.training.optim import learning_rate
from multifire.training.state import Training
from multifire.training.step import sum_of_losses, sum_of_own
from multifire.utils.device import describe_machine
from multifire.utils.log import log


def selection_split(cfg: RunConfig) -> str:
    """Return the name of the split on which the best epoch is chosen: "validation" if there is one, else "test"."""
    return "validation" if cfg.data.validation else "test"


def epoch_figures(training: Training, scored: Evaluation) -> dict[str, Any]:
    """Return the figures of the finished epoch, as metrics.jsonl records them."""
    position, split = training.position, selection_split(training.cfg)
    seen = max(position.seen, 1)  # 0 if every step was skipped
    # The optimiser need not hold the rate of the last step: an earlier process may have done that step.
    last_step = (position.epoch + 1) * training.steps_per_epoch - 1
    return {
        "train_loss": position.loss_sum / seen,
        "train_accuracy": position.correct / seen,
        f"{split}_loss": scored.loss,
        f"{split}_accuracy": scored.accuracy,
        f"{split}_accuracy_per_step": scored.per_step,
        "lr": learning_rate(training.cfg.optim, last_step, training.steps_per_epoch),
        "seconds": position.epoch_seconds,
        "images_per_second": position.seen / position.epoch_seconds,
    }


def record_epoch(training: Training, scored: Evaluation, figures: dict[str, Any]) -> None:
    """Append the epoch's figures to metrics.jsonl and, if it is due, its analysis to analysis.jsonl."""
    epoch, every = training.position.epoch, training.options.analyze_every
    if not training.processes.is_first:
        return
    training.run.record(epoch, figures)
    if every and (epoch + 1) % every == 0:
        analysis = analyse_or_warn(training, training.batches.selection_analysis, scored)
        if analysis:
            training.run.record_analysis(epoch, {"split": selection_split(training.cfg), **analysis})


def analyse_or_warn(training: Training, batches: Batches | EventBatches, scored: Evaluation) -> dict[str, Any] | None:
    """Return the analysis of the scored network on a few samples.

    Return None for a network of the user, whose layers are not known, and with a warning if a membrane is NaN.
    """
    if is_own(training.model):
        return None
    own = training.own.loss
    loss = partial(sum_of_losses, optim=training.cfg.optim) if own is None else partial(sum_of_own, own)
    model, precision = training.scored_model, training.cfg.precision
    try:
        return analyze(model, list(batches.epoch(0)), loss=loss, precision=precision, scored=scored).record()
    except FloatingPointError as error:
        log.warning("epoch %d is not analysed: %s", training.position.epoch + 1, error)
        return None


def summarise(training: Training) -> dict[str, Any]:
    """Score the trained network on the test split, write summary.json and analysis.json, and return the summary.

    `test_accuracy` is that of the best checkpoint if there is a validation split, else that of the last one: the test
    split must not choose the checkpoint that it scores.
    """
    cfg, position, processes = training.cfg, training.position, training.processes
    model = training.scored_model
    last = score_test(training)
    headline, checkpoint = last, "last"
    if cfg.data.validation:
        best = processes.same(load_checkpoint(training.run.best).model if processes.is_first else None)
        load_weights(model, best, source=str(training.run.best))
        headline, checkpoint = score_test(training), "best by validation"
    summary = {
        "recipe": cfg.recipe,
        "data": cfg.data.name,
        "simulated": training.batches.info.simulated,
        "test_accuracy": headline.accuracy,
        "test_accuracy_of": checkpoint,
        "test_loss": headline.loss,
        "last_test_accuracy": last.accuracy,
        "best": {"chosen_by": selection_split(cfg), "accuracy": position.best, "epoch": position.best_epoch},
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
    if processes.is_first:
        if training.options.analyze_every:
            analysis = analyse_or_warn(training, training.batches.test_analysis, headline)
            if analysis:
                training.run.write_analysis({"split": "test", "checkpoint": checkpoint, **analysis})
        training.run.write_summary(summary)
    return summary


def score_test(training: Training) -> Evaluation:
    """Score the network on the test split; the processes share the samples."""
    return evaluate(
        training.scored_model,
        training.batches.test,
        training.cfg.precision,
        total=training.processes.total,
        logits=training.logits,
    )
