"""Data sets by name. Imports neither torch nor NumPy: the readers are imported when something is loaded."""

import importlib
from typing import TYPE_CHECKING, Any

from multifire.datasets.load import (
    Dataset,
    as_split,
    complete,
    describe,
    describe_run,
    input_size,
    load,
    make_dataset,
)
from multifire.datasets.registry import (
    DATASETS,
    OWN_DATA,
    DatasetInfo,
    Download,
    get_info,
    is_own,
    needs_preparation,
    register_dataset,
)
from multifire.datasets.splits import EventSplit, Split, hold_out, take

if TYPE_CHECKING:
    from multifire.datasets.arrays import from_arrays, from_dataset, normalise
    from multifire.datasets.mixup import MixedLabels

__all__ = [
    "DATASETS",
    "OWN_DATA",
    "Dataset",
    "DatasetInfo",
    "Download",
    "EventSplit",
    "MixedLabels",
    "Split",
    "as_split",
    "complete",
    "describe",
    "describe_run",
    "from_arrays",
    "from_dataset",
    "get_info",
    "hold_out",
    "input_size",
    "is_own",
    "load",
    "make_dataset",
    "needs_preparation",
    "normalise",
    "register_dataset",
    "take",
]

_NAMES = {"from_arrays": "arrays", "from_dataset": "arrays", "normalise": "arrays", "MixedLabels": "mixup"}
"""Names whose modules import NumPy or torch."""


def __getattr__(name: str) -> Any:
    if name in _NAMES:
        return getattr(importlib.import_module(f"multifire.datasets.{_NAMES[name]}"), name)
    raise AttributeError(f"module 'multifire.datasets' has no attribute {name!r}")
