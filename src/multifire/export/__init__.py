"""Where a trained network goes: folded, in integers, and with a passport that says where it came from."""

from multifire.export.fold import FoldedFire, Shift, fold
from multifire.export.passport import describe, make_passport

__all__ = [
    "FoldedFire",
    "Shift",
    "describe",
    "fold",
    "make_passport",
]
