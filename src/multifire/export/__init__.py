"""Export trained networks: folded, int8, ONNX, NIR, folders to share; read the provenance of a file."""

from multifire.export.fold import FoldedFire, Shift, fold
from multifire.export.int8 import Int8Network, load_int8, quantise_network, save_int8
from multifire.export.provenance import describe, make_provenance

__all__ = [
    "FoldedFire",
    "Int8Network",
    "Shift",
    "describe",
    "fold",
    "load_int8",
    "make_provenance",
    "quantise_network",
    "save_int8",
]
