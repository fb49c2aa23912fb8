"""Whether a gradient's memory is nobody else's, so that the next gradient may be written over it."""

import functools
import sys
from typing import Any

import torch
from torch import Tensor


def is_ours(grad: Tensor) -> bool:
    """Whether nothing but the backward call that got `grad` from autograd can see its memory.

    To be asked by the `backward` of a torch.autograd.Function itself. Autograd gives most gradients away for good, but
    a hook, `torch.autograd.grad`, its caller or the other summand of a sum may hold on to one. All of them count as
    references to the tensor, to what it is a view of, or to its storage; those of a gradient that nobody holds are
    counted beforehand.
    """
    if sys.gettrace() is not None:  # a debugger holds on to what it shows
        return False
    return _references(grad) in _of_nobody_elses() and grad.untyped_storage().resizable()  # else another library's


def _references(x: Any) -> tuple[int, ...]:
    storage = torch._C._storage_Use_Count(x.untyped_storage()._cdata)
    counts = (sys.getrefcount(x), x._use_count(), storage)
    base = x._base
    return counts if base is None else (*counts, sys.getrefcount(base), base._use_count())


@functools.cache
def _of_nobody_elses() -> frozenset[tuple[int, ...]]:
    """References to a gradient that nobody holds, a tensor of its own or a view; none where torch cannot count them."""
    found: set[tuple[int, ...]] = set()
    if hasattr(Tensor, "_use_count") and hasattr(torch._C, "_storage_Use_Count"):  # torch promises neither
        with torch.enable_grad():
            leaf = torch.zeros(2, 2, device="cpu", requires_grad=True)
            for last in (torch.neg, lambda x: x.view(4).neg()):
                last(_Count.apply(leaf, found)).sum().backward()
    return frozenset(found)


class _Count(torch.autograd.Function):
    """Counts the references to the gradient that it is given, on the way on which `is_ours` is asked."""

    @staticmethod
    def forward(ctx, x, found):
        ctx.found = found
        return x.clone()

    @staticmethod
    def backward(ctx, grad, *_):  # pyright: ignore[reportIncompatibleMethodOverride] - as those that ask
        _note(grad, ctx.found)
        return None, None


def _note(grad: Tensor, found: set[tuple[int, ...]]) -> None:
    found.add(_references(grad))
