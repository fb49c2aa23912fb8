"""Sums over the processes of the default group, for statistics over the samples of all processes.

All processes must call these functions in the same order, which the order of the network's layers ensures. C channels.
"""

import torch
import torch.distributed as dist
from torch import Tensor


class _Sum(torch.autograd.Function):
    """Sum over processes. Every loss depends on every summand, so the gradient is summed over processes too."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        total = x.contiguous().clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx, *grads: Tensor) -> Tensor:
        total = grads[0].contiguous().clone()
        dist.all_reduce(total)
        return total


def summed(x: Tensor) -> Tensor:
    """Return Σ over processes of x, differentiable."""
    return _Sum.apply(x)  # pyright: ignore[reportReturnType]


def pool_statistics(mean: Tensor, var: Tensor, values: Tensor) -> None:
    """Replace mean [C], biased variance [C] and number of values per channel [] by those of all processes, in place.

    n = Σ n_r,   μ = Σ n_r·μ_r / n,   σ² = Σ n_r·(σ_r² + (μ_r - μ)²) / n
    """
    own = torch.cat([values.view(1), mean.double(), var.double()])
    if not values.item():  # a process without samples has no statistics
        own.zero_()
    everyone = own.new_zeros((dist.get_world_size(), len(own)))
    everyone[dist.get_rank()] = own
    dist.all_reduce(everyone)  # instead of a gather, whose functions differ between versions of torch
    n_R1, means_RC, vars_RC = everyone[:, :1], *everyone[:, 1:].chunk(2, 1)
    n = n_R1.sum()
    pooled = (n_R1 * means_RC).sum(0) / n
    mean.copy_(pooled)
    var.copy_((n_R1 * (vars_RC + (means_RC - pooled).square())).sum(0) / n)
    values.copy_(n)


def pool_sums(sums: Tensor, values: float) -> float:
    """Sum the sums [2, C] over processes, in place; return the number of values per channel of all processes."""
    both = torch.cat([sums.flatten(), sums.new_tensor([values])])
    dist.all_reduce(both)
    sums.copy_(both[:-1].view_as(sums))
    return both[-1].item()
