"""Stochastic gradient descent as the trainer runs it."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class SGD(torch.optim.SGD):
    """torch's SGD in its fused kernel, on tensors in the order in which they lie in memory.

        v = momentum·v + (∇ + weight_decay·w),   w = w - lr·v

    Left to itself, torch 2.13 first copies the gradient of every channels-last weight, which takes twice as long as the
    step; and a gradient or v in another order than the weight it takes for one in the same, and mixes up its values
    without a word. Groups and state are torch's.
    """

    def __init__(self, params: Any, lr: float, momentum: float = 0.0, weight_decay: float = 0.0):
        super().__init__(params, lr, momentum, weight_decay=weight_decay, fused=True)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; a `closure` is called first, to compute the gradients, and what it returns is returned."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            momentum = group["momentum"]
            torch._fused_sgd_(
                [_as_it_lies(p) for p in params],
                [_as_it_lies(_laid_out_as(p, p.grad)) for p in params],
                [_as_it_lies(self._velocity(p)) for p in params] if momentum else [],
                weight_decay=group["weight_decay"], momentum=momentum, lr=group["lr"],
                dampening=0.0, nesterov=False, maximize=False, is_first_step=False,
            )  # fmt: skip
        return loss

    def _velocity(self, p: Tensor) -> Tensor:
        state = self.state[p]
        v = state.get("momentum_buffer")
        state["momentum_buffer"] = torch.zeros_like(p) if v is None else _laid_out_as(p, v)
        return state["momentum_buffer"]


def _laid_out_as(p: Tensor, x: Tensor) -> Tensor:
    return x if x.stride() == p.stride() else torch.empty_like(p).copy_(x)


def _as_it_lies(x: Tensor) -> Tensor:
    """A view whose strides fall, of a contiguous or channels-last tensor."""
    return x.permute(0, 2, 3, 1) if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last) else x
