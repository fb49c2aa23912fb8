"""Inspect a file or folder that multifire wrote: its content and its provenance."""

from pathlib import Path
from typing import Any

from multifire.export.export_run import import_format
from multifire.export.onnx_digest import read_metadata
from multifire.export.pretrained import inspect_folder
from multifire.export.provenance import KINDS, measurements_of, provenance_of, read_provenance, stored
from multifire.training.checkpoint import load_checkpoint
from multifire.utils.hdf5_texts import MAGIC
from multifire.utils.tensor_files import kind_of, read_tensors


def inspect(path: Path) -> tuple[str, dict[str, Any]]:
    """Check a checkpoint, exported file or folder completely; return its content, in words, and its provenance.

    Raises:
        FileNotFoundError: no such file.
        ValueError: damaged, altered, or not written by multifire.
    """
    if path.is_dir():
        return inspect_folder(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    return {"nir": _inspect_nir, "onnx": _inspect_onnx, "safetensors": _inspect_safetensors}[_format(path)](path)


def _format(path: Path) -> str:
    """Return the format by the first bytes, or by the ending if the first bytes are damaged."""
    with path.open("rb") as file:
        start = file.read(9)
    if start.startswith(MAGIC) or path.suffix == ".nir":
        return "nir"
    # safetensors starts with the length of its header, 8 bytes, and a brace; ONNX starts with field 1, a number
    return "onnx" if start[8:] != b"{" and (start[:1] == b"\x08" or path.suffix == ".onnx") else "safetensors"


def _inspect_nir(path: Path) -> tuple[str, dict[str, Any]]:
    content, provenance = import_format("nir").read_metadata(path)
    return content, read_provenance(provenance, str(path))


def _inspect_onnx(path: Path) -> tuple[str, dict[str, Any]]:
    metadata = read_metadata(path)
    provenance = read_provenance(stored(metadata, "null"), str(path))
    content = f"ONNX {metadata.get('kind', 'model')}, weights in {metadata.get('weights', 'unknown')}"
    return f"{content}, {path.stat().st_size:,} bytes", provenance


def _inspect_safetensors(path: Path) -> tuple[str, dict[str, Any]]:
    header, tensors = read_tensors(path, KINDS)
    numbers = sum(tensor.numel() for tensor in tensors.values())
    content = f"{kind_of(header)}, {len(tensors)} tensors, {numbers:,} numbers"
    if kind_of(header) != "checkpoint":
        return content, read_provenance(stored(header, "null"), str(path))
    checkpoint = load_checkpoint(path)
    return content, provenance_of(path, checkpoint) | measurements_of(path, checkpoint)
