"""Write the state of a run as a checkpoint, and restore it from the newest one."""

import torch

from multifire.training.checkpoint import Checkpoint, load_newest, load_weights, save_checkpoint
from multifire.training.state import Training
from multifire.utils.log import log
from multifire.utils.tensor_files import check_keys


def save_last(training: Training) -> None:
    """Write the run's state as its newest checkpoint; keep the newest `options.keep`."""
    if training.processes.is_first:
        save_checkpoint(training.run.last, snapshot(training), training.options.keep)


def save_best(training: Training) -> None:
    """Write the scored weights as the best checkpoint, without the optimiser's state."""
    if training.processes.is_first:
        weights = training.scored_model.state_dict()
        save_checkpoint(training.run.best, Checkpoint(training.cfg, training.position, weights, {}))


def snapshot(training: Training) -> Checkpoint:
    """Return the run's state. It shares its tensors with the network, so write it before the next step."""
    states = {name: training.optimizer.state[parameter] for name, parameter in training.model.named_parameters()}
    momentum = {name: state["momentum_buffer"] for name, state in states.items() if "momentum_buffer" in state}
    average = training.average.module.state_dict() if training.average else {}
    return Checkpoint(training.cfg, training.position, training.model.state_dict(), momentum, average)


def restore_if_resuming(training: Training) -> None:
    """Load the newest intact checkpoint of the run; do nothing in a new run. The first process reads it for all.

    Raises:
        FileNotFoundError: the run has recorded epochs but has no checkpoint.
        ValueError: every checkpoint is damaged, or the newest intact one does not fit the network.
    """
    run, newest = training.run, None
    if training.processes.is_first and run.exists():
        newest = load_newest(run.last)
        if newest is None and run.metrics():
            raise FileNotFoundError(f"{run.last} is missing; restore it from a copy, or give --out for another folder")
        run.drop_records_from(newest[0].position.epoch if newest else 0)
    newest = training.processes.same(newest)
    if newest is None:
        return
    checkpoint, file = newest
    load_weights(training.model, checkpoint.model, str(file))
    _restore_momentum(training, checkpoint, str(file))
    if training.average:
        load_weights(training.scored_model, checkpoint.average, f"{file}: moving average")
        training.average.n_averaged.fill_(1)  # at 0, the next update would replace the average by the weights
    training.position = checkpoint.position
    log.info("resuming from %s: epoch %d, step %d", file, training.position.epoch + 1, training.position.step)


def _restore_momentum(training: Training, checkpoint: Checkpoint, source: str) -> None:
    parameters = dict(training.model.named_parameters())
    if checkpoint.optimizer:
        check_keys(checkpoint.optimizer, {name: p.shape for name, p in parameters.items()}, f"{source}: momentum")
    for name, momentum in checkpoint.optimizer.items():
        buffer = torch.empty_like(parameters[name]).copy_(momentum)
        training.optimizer.state[parameters[name]]["momentum_buffer"] = buffer
