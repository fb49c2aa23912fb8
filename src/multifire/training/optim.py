"""Make the optimiser, and compute the learning-rate schedule."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from multifire.config import OptimConfig
from multifire.nn import MLF

ONE_CYCLE_START, ONE_CYCLE_END = 1 / 25, 1e-4
"""Learning rate at the start and at the end of the one-cycle schedule, as factors of the highest rate."""


ADAM_BETA_2 = 0.999


def make_optimizer(model: nn.Module, optim: OptimConfig) -> torch.optim.Optimizer:
    """Return the optimiser that `optim` names, for the model's parameters.

    On a GPU the learning rate is a tensor on the device, which a CUDA graph reads at each replay.
    """
    parameter = next(model.parameters())
    lr = torch.tensor(optim.lr, device=parameter.device) if parameter.is_cuda else optim.lr
    groups = parameter_groups(model, optim)
    if optim.optimizer == "adamw":
        betas = (optim.momentum, ADAM_BETA_2)
        return torch.optim.AdamW(groups, lr, betas, weight_decay=optim.weight_decay, capturable=parameter.is_cuda)
    return SGD(groups, lr, optim.momentum, optim.weight_decay)


def moments_of(optim: OptimConfig) -> int:
    """Return how many numbers the optimiser keeps for each parameter."""
    return 2 if optim.optimizer == "adamw" else int(optim.momentum > 0)


def prepare_own_optimizer(optimizer: torch.optim.Optimizer, captured: bool) -> None:
    """Let an optimiser that the user made follow the schedule, from its own learning rates, and a CUDA graph read them.

    Raises:
        ValueError: it holds no parameters.
    """
    if not any(group["params"] for group in optimizer.param_groups):
        raise ValueError("the optimiser holds no parameters; make it of those that the function gets")
    for group in optimizer.param_groups:
        group["initial_lr"] = float(group["lr"])
        if captured:
            group["lr"] = torch.tensor(group["initial_lr"], device=group["params"][0].device)
            if "capturable" in group:
                group["capturable"] = True


def parameter_groups(model: nn.Module, optim: OptimConfig) -> list[dict[str, Any]]:
    """Group the parameters by weight decay.

    Learned thresholds and decays of neurons never decay; without `decay_norms`, weights and biases of norms do not.
    """
    of_neurons = {p for module in model.modules() if isinstance(module, MLF) for p in module.parameters()}
    others = [p for p in model.parameters() if p not in of_neurons]
    decaying = [p for p in others if optim.decay_norms or p.dim() > 1]
    not_decaying = [p for p in others if not optim.decay_norms and p.dim() <= 1]
    groups: list[dict[str, Any]] = [{"params": decaying}]
    if not_decaying:
        groups.append({"params": not_decaying, "weight_decay": 0.0})
    if of_neurons:
        groups.append({"params": [p for p in model.parameters() if p in of_neurons], "weight_decay": 0.0})
    return groups


def set_learning_rate(optimizer: torch.optim.Optimizer, optim: OptimConfig, step: int, steps_per_epoch: int) -> None:
    """Set the learning rate of all parameter groups for training step number `step`.

    A group with an `initial_lr` of its own follows the same schedule, with that as its highest rate.
    """
    for group in optimizer.param_groups:
        rate = learning_rate(optim, step, steps_per_epoch)
        if "initial_lr" in group:
            rate *= group["initial_lr"] / optim.lr
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def learning_rate(optim: OptimConfig, step: int, steps_per_epoch: int) -> float:
    """Return the learning rate of training step number `step`, counted from 0 at the start of the run.

    It depends on nothing but the step, so that a checkpoint need not store it.
    """
    progress = step / (optim.epochs * steps_per_epoch)
    warmup = min(1.0, (step + 1) / max(1.0, optim.warmup_epochs * steps_per_epoch))
    if optim.schedule == "step":
        return warmup * optim.lr * optim.gamma ** (step // steps_per_epoch // optim.step_epochs)
    if optim.schedule == "cosine":
        return warmup * optim.lr * _cosine(1.0, 0.0, progress)
    if progress < optim.warmup_share:
        return optim.lr * _cosine(ONE_CYCLE_START, 1.0, progress / optim.warmup_share)
    return optim.lr * _cosine(1.0, ONE_CYCLE_END, (progress - optim.warmup_share) / (1 - optim.warmup_share))


def _cosine(start: float, end: float, progress: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * progress)) / 2


class SGD(torch.optim.SGD):
    """torch's SGD with its fused kernel, which receives every tensor in the memory layout of the weight.

        v = momentum·v + (∇ + weight_decay·w),   w = w - lr·v

    Without this, torch 2.13 copies the gradient of every channels-last weight, which takes twice as long as the step
    itself, and it mixes up the values of a gradient or v in another layout than the weight. Parameter groups and state
    have the same form as in torch.
    """

    def __init__(self, params: Any, lr: float | Tensor, momentum: float = 0.0, weight_decay: float = 0.0):
        super().__init__(params, lr, momentum, weight_decay=weight_decay, fused=True)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Do one step. If there is a `closure`, call it first to compute the gradients, and return its result."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            momentum = group["momentum"]
            torch._fused_sgd_(
                [_contiguous_view(p) for p in params],
                [_contiguous_view(_to_layout(p, p.grad)) for p in params],
                [_contiguous_view(self._velocity(p)) for p in params] if momentum else [],
                weight_decay=group["weight_decay"], momentum=momentum, lr=group["lr"],
                dampening=0.0, nesterov=False, maximize=False, is_first_step=False,
            )  # fmt: skip
        return loss

    def _velocity(self, p: Tensor) -> Tensor:
        state = self.state[p]
        v = state.get("momentum_buffer")
        state["momentum_buffer"] = torch.zeros_like(p) if v is None else _to_layout(p, v)
        return state["momentum_buffer"]


def _to_layout(p: Tensor, x: Tensor) -> Tensor:
    return x if x.stride() == p.stride() else torch.empty_like(p).copy_(x)


def _contiguous_view(x: Tensor) -> Tensor:
    """Return a contiguous view of a contiguous or channels-last tensor."""
    return x.permute(0, 2, 3, 1) if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last) else x
