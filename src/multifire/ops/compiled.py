"""The reference under torch.compile: for neurons with a registered surrogate, which no kernel computes.

Compiling takes some seconds for each new kind of call, so small tensors are computed as they are.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from multifire.ops import reference
from multifire.utils.log import log

MIN_VALUES = 1 << 18
"""Calls with fewer values of x are not compiled."""

_compile_failed = False


def mlf(x: Tensor, *args: Any, **options: Any) -> tuple[Tensor, Tensor]:
    """Compute `reference.mlf`, compiled if x is large and this machine has a compiler."""
    global _compile_failed
    if x.numel() < MIN_VALUES or _compile_failed or torch.compiler.is_compiling():
        return reference.mlf(x, *args, **options)
    try:
        return _compiled()(x, *args, **options)
    except Exception as error:  # compilers fail in many ways; the reference says what is wrong with a call
        computed = reference.mlf(x, *args, **options)
        _compile_failed = True
        log.warning("torch.compile failed, neurons are computed without it: %s", str(error).strip().partition("\n")[0])
        return computed


def tdbn_mlf(x: Tensor, *args: Any, **options: Any) -> tuple[Tensor, Tensor | None]:
    """Compute `reference.tdbn_mlf` with this module's `mlf`."""
    return reference.tdbn_mlf(x, *args, **options, fire=mlf)


@functools.cache
def _compiled() -> Callable[..., tuple[Tensor, Tensor]]:
    return torch.compile(reference.mlf)
