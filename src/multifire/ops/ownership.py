"""Whether a gradient's memory is nobody else's, so that the next gradient may be written over it."""

import functools
import sys
from typing import Any

import torch
from torch import Tensor

_C: Any = torch._C


def is_ours(grad: Tensor) -> bool:
    """Whether nothing but the backward call that got `grad` from autograd can see its memory.

    To be asked by the `backward` of a torch.autograd.Function itself, of one of its arguments.
    """
    if not _countable(grad) or _references(grad) not in _of_nobody_elses():
        return False
    storage = grad.untyped_storage()  # whoever has this sees the memory too, so that only now it may be made
    return storage.resizable() and not storage.is_shared()  # else it is another library's, or another process's too


def is_held_by_nobody(grad: Tensor) -> bool:
    """As `is_ours`, but other libraries and processes may see the memory; autograd may still add to `grad` in place."""
    return _countable(grad) and _references(grad) in _of_nobody_elses()


def _countable(grad: Tensor) -> bool:
    """Not under a debugger or profiler, which may hold on to what it sees, nor where one tensor stands for several."""
    watched = sys.gettrace() is not None or sys.getprofile() is not None
    several = is_batch(grad) or _C._are_functorch_transforms_active()
    return type(grad) is Tensor and not watched and not several


def is_batch(grad: Tensor) -> bool:
    """Whether a gradient stands for several, as `torch.autograd.grad(is_grads_batched=True)` makes it."""
    return _C._functorch.is_legacy_batchedtensor(grad)


def _references(x: Any) -> tuple[int, ...]:
    """How many there are to a tensor, to its storage, and to what it is a view of.

    Autograd gives most gradients away for good, but a hook, `torch.autograd.grad`, its caller or the other summand of a
    sum may hold on to one, and each of them counts here.
    """
    counts = (sys.getrefcount(x), x._use_count(), _C._storage_Use_Count(_C._storage_address(x)))
    base = x._base
    return counts if base is None else (*counts, sys.getrefcount(base), base._use_count())


@functools.cache
def _of_nobody_elses() -> frozenset[tuple[int, ...]]:
    """References to a gradient that nobody holds, a tensor of its own or a view; none where torch cannot count them.

    Counted twice, for another thread may look at a frame meanwhile.
    """
    countable = hasattr(Tensor, "_use_count") and {"_storage_Use_Count", "_storage_address"} <= set(dir(_C))
    return frozenset(_count() & _count()) if countable else frozenset()  # torch promises none of these


def _count() -> set[tuple[int, ...]]:
    found: set[tuple[int, ...]] = set()
    with torch.inference_mode(False), torch.enable_grad():
        leaf = torch.zeros(2, 2, device="cpu", requires_grad=True)
        for last in (torch.neg, lambda x: x.view(4).neg()):
            last(_Count.apply(leaf, found)).sum().backward()
    return found


class _Count(torch.autograd.Function):
    """Counts the references to the gradient that it is given, as far down in calls as those that ask above."""

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
