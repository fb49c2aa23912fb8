"""Surrogate derivatives: what a spike's derivative is taken to be in the backward pass, as a function of v = u - θ.

Each built-in one has area 1 and height 1/a at v = 0 for width a, so that they can be exchanged without another
learning rate. A new built-in one also goes into SURROGATES of config/neurons.py and into the kernels,
csrc/neuron.h and triton_parts.py, at the same position. A registered one runs on the reference alone.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from multifire.config import neurons

Surrogate = Callable[[Tensor, float], Tensor]
"""Function of v and the width a that returns the derivative at each v."""


def rect(v: Tensor, width: float) -> Tensor:
    """Rectangular surrogate derivative, 1/a where |v| < a/2."""
    return (v.abs() < width / 2).to(v.dtype) / width


def triangle(v: Tensor, width: float) -> Tensor:
    """Triangular surrogate derivative, max(0, 1 - |v|/a) / a."""
    return (1 - v.abs() / width).clamp_min(0) / width


def atan(v: Tensor, width: float) -> Tensor:
    """Derivative of atan(πv/a)/π, which is 1 / (a·(1 + (πv/a)²))."""
    return 1 / (width * (1 + (math.pi / width * v).square()))


def sigmoid(v: Tensor, width: float) -> Tensor:
    """Derivative of σ(4v/a), which is 4/a · σ(4v/a)·σ(-4v/a): the usual α·σ(αv)·(1 - σ(αv)) with slope α = 4/a."""
    z = 4 / width * v
    return torch.sigmoid(z) * torch.sigmoid(-z) * (4 / width)


def gaussian(v: Tensor, width: float) -> Tensor:
    """Density of a normal distribution of deviation a/√(2π): exp(-π·(v/a)²) / a."""
    return torch.exp(-math.pi * (v / width).square()) / width


SURROGATES: dict[str, Surrogate] = {
    "rect": rect,
    "triangle": triangle,
    "atan": atan,
    "sigmoid": sigmoid,
    "gaussian": gaussian,
}
assert tuple(SURROGATES) == neurons.SURROGATES


def register_surrogate(name: str) -> Callable[[Surrogate], Surrogate]:
    """Return a decorator that makes a function of (v, width) the surrogate derivative of this name.

        @mf.register_surrogate("bell")
        def bell(v, width):
            return torch.exp(-(v / width) ** 2)

    The function computes the derivative ∂s/∂u elementwise at v = u - θ, with operations of torch. It runs on the
    reference backend, which is slower than a kernel; the log says so once. Layers of 2^18 values and more run under
    torch.compile, where there is a compiler.

    Raises:
        ValueError: the name exists.
    """

    def register(function: Surrogate) -> Surrogate:
        neurons.add_surrogate_name(name)
        SURROGATES[name] = function
        return function

    return register


def derivative(name: str, v: Tensor, width: float) -> Tensor:
    """Return the derivative of the surrogate of this name at v.

    Raises:
        ValueError: a registered function returns something else than a tensor like v.
    """
    h = SURROGATES[name](v, width)
    if name not in neurons.SURROGATES and (not isinstance(h, Tensor) or h.shape != v.shape):
        found = f"shape {tuple(h.shape)}" if isinstance(h, Tensor) else type(h).__name__
        raise ValueError(f"surrogate {name!r} returned {found}, expected a tensor of v's shape {tuple(v.shape)}")
    return h.to(v.dtype)
