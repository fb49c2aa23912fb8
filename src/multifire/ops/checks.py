"""Checks of the ops' arguments. A kernel trusts them: it would read past the end of a tensor that is too short."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from multifire.config import neurons


def check_neuron(
    x: Tensor,
    thresholds: Sequence[float],
    decay: float,
    surrogate: str,
    width: float,
    state: Tensor | None,
    reset: str = "zero",
    membranes: str = "own",
    signed: bool = False,
    learned_thresholds: Tensor | None = None,
    learned_decay: Tensor | None = None,
) -> None:
    """Raise a ValueError if an argument of `multifire.ops.mlf` is unknown, of a wrong shape, or does not fit."""
    if x.dim() < 1 or x.shape[0] < 1:
        raise ValueError(f"x has shape {tuple(x.shape)}, expected [T, ...] with at least one time step")
    if not x.is_floating_point():
        raise ValueError(f"x is of {x.dtype}, expected floating point; convert it with x.float()")
    check_numbers(thresholds, decay)
    if len(thresholds) < 1:
        raise ValueError("thresholds is empty, expected one for each of K >= 1 levels")
    neurons.check_surrogate(surrogate)
    if not width > 0:
        raise ValueError(f"surrogate width is {width}, expected above 0")
    neurons.check_dynamics(thresholds, reset, membranes, signed)
    rows = 1 if membranes == "shared" else len(thresholds)
    if state is not None and state.shape != (rows, *x.shape[1:]):
        raise ValueError(f"state has shape {tuple(state.shape)}, expected {(rows, *x.shape[1:])}")
    for name, learned, shape in (
        ("learned_thresholds", learned_thresholds, (len(thresholds),)),
        ("learned_decay", learned_decay, ()),
    ):
        if learned is not None and (learned.shape != shape or not learned.is_floating_point()):
            found = f"shape {tuple(learned.shape)}, {learned.dtype}"
            raise ValueError(f"{name} has {found}, expected {shape} in floating point")


def check_numbers(thresholds: Sequence[float], decay: float) -> None:
    """Raise a ValueError if a tensor stands where a number is expected: it would not learn."""
    if isinstance(thresholds, Tensor) or any(isinstance(threshold, Tensor) for threshold in thresholds):
        raise ValueError(
            "thresholds is a tensor, expected numbers: a tensor would not learn here. Take "
            "mf.nn.MLF(..., learn_thresholds=True), or pass learned_thresholds to the op"
        )
    if isinstance(decay, Tensor):
        raise ValueError(
            "decay is a tensor, expected a number: a tensor would not learn here. Take "
            "mf.nn.MLF(..., learn_decay=True), or pass learned_decay to the op"
        )


def check_no_norm(x: Tensor, *of_norm: Tensor | bool | None) -> None:
    """Raise a ValueError if x has no five dimensions, or if there is a part of a norm."""
    if x.dim() != 5:
        raise ValueError(f"x has shape {tuple(x.shape)}, expected [T, N, C, H, W]")
    if any(value is not None and value is not False for value in of_norm):
        raise ValueError("without running_mean and running_var there is no norm: expected no weight, bias or training")


def check_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    training: bool,
    sync: bool,
) -> None:
    """Raise a ValueError if the tensors of a norm do not fit x, or cannot be trained."""
    channels = running_mean.numel()
    of_channels = {"weight": weight, "bias": bias, "running_mean": running_mean, "running_var": running_var}
    for name, tensor in of_channels.items():
        if tensor is not None and tensor.shape != (channels,):
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected ({channels},), running_mean's")
    if not x.is_floating_point():
        raise ValueError(f"x is of {x.dtype}, expected floating point; convert it with x.float()")
    if x.dim() != 5 or x.shape[2] != channels:
        raise ValueError(f"x has shape {tuple(x.shape)}, expected [T, N, {channels}, H, W]")
    if training and running_mean.dtype in (torch.float16, torch.bfloat16):
        raise ValueError(
            f"running_mean is of {running_mean.dtype}, in which statistics cannot be trained; keep the network in "
            "float32, and train under torch.autocast (with `multifire train`: --precision bf16)"
        )
    if sync and not (dist.is_available() and dist.is_initialized()):
        raise ValueError("sync needs a process group; start the program with torchrun, or leave sync out")
    if training and not sync and x.numel() <= channels:
        raise ValueError(f"x has shape {tuple(x.shape)}: training needs more than one value per channel")
