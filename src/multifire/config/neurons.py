"""What the options of a neuron may be. Imports no torch, so that a configuration is checked before torch is loaded."""

from collections.abc import Sequence
from itertools import pairwise

from multifire.utils.errors import unknown

SURROGATES = ("rect", "triangle", "atan", "sigmoid", "gaussian")
"""Names of the surrogate derivatives that every backend computes."""
MEMBRANES = ("own", "shared")
RESETS = ("zero", "subtract", "any")

_registered: list[str] = []


def surrogate_names() -> tuple[str, ...]:
    """Return the names of all surrogates: the built-in and the registered ones."""
    return (*SURROGATES, *_registered)


def add_surrogate_name(name: str) -> None:
    """Accept this name of a surrogate in configurations from now on.

    Raises:
        ValueError: the name exists.
    """
    if name in surrogate_names():
        raise ValueError(f"a surrogate {name!r} exists already; choose another name")
    _registered.append(name)


def check_surrogate(name: str) -> None:
    """Raise a ValueError if there is no surrogate of this name."""
    if name not in surrogate_names():
        raise ValueError(
            f"unknown surrogate {name!r}, expected one of {', '.join(surrogate_names())}, or a name that "
            "mf.register_surrogate has registered: import the code that registers it first"
        )


def check_dynamics(thresholds: Sequence[float], reset: str, membranes: str, signed: bool) -> None:
    """Check that membranes, reset and thresholds describe a neuron of the family; see `multifire.ops.mlf`.

    Raises:
        ValueError: an unknown name, or options that do not go together; says which to take.
    """
    if membranes not in MEMBRANES:
        raise unknown("membranes", membranes, MEMBRANES)
    if reset not in RESETS:
        raise unknown("reset", reset, RESETS)
    if membranes == "own" and reset == "any":
        raise ValueError(
            "reset='any' is for membranes='shared'; where every level has its own membrane, take reset='zero', "
            "which resets each by its own spike"
        )
    if membranes == "shared" and reset == "zero":
        raise ValueError(
            "reset='zero' is for membranes='own'; where the levels share one membrane, take reset='any', "
            "which sets it to zero if any level fires"
        )
    if membranes == "shared" and any(a >= b for a, b in pairwise(thresholds)):
        raise ValueError(f"thresholds is {tuple(thresholds)}, expected ascending ones where levels share a membrane")
    if signed and any(threshold < 0 for threshold in thresholds):
        raise ValueError(f"thresholds is {tuple(thresholds)}, expected none below 0 for signed levels")


def check_learnable(thresholds: Sequence[float], decay: float, learn_thresholds: bool, learn_decay: bool) -> None:
    """Raise a ValueError if thresholds or decay are to be learned, but not from values that they can take."""
    if learn_thresholds and not all(below < above for below, above in pairwise((0.0, *thresholds))):
        raise ValueError(
            f"thresholds is {tuple(thresholds)}, expected ascending ones above 0 with learn_thresholds: "
            "they are learned as sums of positive gaps"
        )
    if learn_decay and not 0 < decay < 1:
        raise ValueError(f"decay is {decay}, expected 0 < decay < 1 with learn_decay: it is learned through a sigmoid")
