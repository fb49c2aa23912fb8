"""Data sets by name. Imports neither torch nor NumPy: the readers are imported when something is loaded."""

from multifire.datasets.load import Dataset, load
from multifire.datasets.registry import DATASETS, DatasetInfo, Download, get_info
from multifire.datasets.splits import EventSplit, Split, hold_out, take

__all__ = [
    "DATASETS",
    "Dataset",
    "DatasetInfo",
    "Download",
    "EventSplit",
    "Split",
    "get_info",
    "hold_out",
    "load",
    "take",
]
