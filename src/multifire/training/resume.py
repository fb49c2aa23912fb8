"""Write the state of a run as a checkpoint, and restore it from the newest one."""

import torch
from torch import Tensor

from multifire.training.checkpoint import Checkpoint, load_newest, load_weights, save_checkpoint
from multifire.training.state import Training
from multifire.utils.log import log
from multifire.utils.tensor_files import check_keys

MOMENTUM = "momentum_buffer"
"""SGD's name of the momentum."""


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
    average = training.average.module.state_dict() if training.average else {}
    return Checkpoint(training.cfg, training.position, training.model.state_dict(), optimizer_state(training), average)


def optimizer_state(training: Training) -> dict[str, Tensor]:
    """Return the optimiser's tensors: the momentum under the parameter's name, others as PARAMETER:NAME.

    Raises:
        ValueError: the optimiser keeps something else, which a checkpoint cannot hold.
    """
    tensors = {}
    for name, parameter in training.model.named_parameters():
        for key, value in training.optimizer.state.get(parameter, {}).items():
            if value is None:
                continue
            if not isinstance(value, Tensor):
                raise ValueError(
                    f"the optimiser keeps {key} = {value!r} of {name}, expected tensors, which a checkpoint can hold"
                )
            tensors[name if key == MOMENTUM else f"{name}:{key}"] = value
    return tensors


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
    _restore_optimizer(training, checkpoint, str(file))
    if training.average:
        load_weights(training.scored_model, checkpoint.average, f"{file}: moving average")
        training.average.is_empty = False
    training.position = checkpoint.position
    log.info("resuming from %s: epoch %d, step %d", file, training.position.epoch + 1, training.position.step)


def _restore_optimizer(training: Training, checkpoint: Checkpoint, source: str) -> None:
    """Give the optimiser the tensors of the checkpoint; see `optimizer_state`."""
    parameters = dict(training.model.named_parameters())
    momenta = {name: tensor for name, tensor in checkpoint.optimizer.items() if ":" not in name}
    if momenta:
        check_keys(momenta, {name: p.shape for name, p in parameters.items()}, f"{source}: momentum")
    capturable = any(group.get("capturable") for group in training.optimizer.param_groups)
    for full_name, tensor in checkpoint.optimizer.items():
        name, _, key = full_name.partition(":")
        if name not in parameters:
            raise ValueError(f"{source}: its optimiser has a state of {name!r}, which the network has not")
        parameter = parameters[name]
        if tensor.shape == parameter.shape:
            restored = torch.empty_like(parameter).copy_(tensor)
        else:  # a counter of steps lies on the host, unless a CUDA graph counts
            restored = tensor.to(parameter.device if capturable else "cpu")
        training.optimizer.state[parameter][key or MOMENTUM] = restored
