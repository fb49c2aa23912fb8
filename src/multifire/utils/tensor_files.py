"""Write and read tensors in safetensors files, with a text header and a digest of the whole content."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import safetensors.numpy
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from multifire.utils.files import write_atomic


def write_tensors(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, str], keep: int = 1) -> None:
    """Write tensors and a text header atomically as a safetensors file, with a digest of both.

    The newest `keep` versions of the file are kept.
    """
    on_cpu = {name: _without_bf16(tensor.detach()).cpu().contiguous() for name, tensor in tensors.items()}
    metadata = {**header, "digest": _digest(on_cpu, header)}
    # safetensors.numpy, because safetensors.torch leaves every tensor in a reference cycle until garbage collection.
    arrays = {name: tensor.numpy() for name, tensor in on_cpu.items()}
    write_atomic(path, safetensors.numpy.save(arrays, metadata=metadata), keep)


def _without_bf16(tensor: Tensor) -> Tensor:
    """Return a bf16 tensor as fp32, since NumPy has no bf16; return other tensors unchanged."""
    return tensor.float() if tensor.dtype is torch.bfloat16 else tensor


def read_tensors(path: Path, versions: Mapping[str, int]) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Read the header and the tensors of a file that `write_tensors` wrote.

    Args:
        path: the file.
        versions: accepted kinds of file and the version of each.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is truncated, altered, of another kind or version, or from another program.
    """
    expected = " or ".join(versions)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such {expected}")
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{path}: damaged, or not of the kind {expected} ({error}); use another one") from None
    kind, version = kind_of(header), header.get("multifire")
    if version is None:
        raise ValueError(f"{path}: not a multifire {expected}; use a file that multifire wrote")
    if kind not in versions or version != str(versions[kind]):
        wanted = " or ".join(f"{kind} of version {version}" for kind, version in versions.items())
        raise ValueError(f"{path}: a multifire {kind} of version {version}, expected a {wanted}")
    undigested = {name: text for name, text in header.items() if name != "digest"}
    if header.get("digest") != _digest(tensors, undigested):
        raise ValueError(f"{path}: damaged: its content does not match its digest; use another one")
    return header, tensors


def digest_of(path: Path) -> str:
    """Return the digest stored in a file that `write_tensors` wrote."""
    with safe_open(path, framework="pt") as file:
        return file.metadata()["digest"]


def kind_of(header: Mapping[str, str]) -> str:
    """Return the kind of a file with this header; a header without a kind belongs to a checkpoint."""
    return header.get("kind", "checkpoint")


def check_keys(state: Mapping[str, Tensor], expected: Mapping[str, torch.Size], source: str) -> None:
    """Raise a ValueError that names the keys of `state` that are missing, extra or of another shape than expected."""
    faults = [f"missing {name}" for name in expected if name not in state]
    faults += [f"extra {name}" for name in state if name not in expected]
    faults += [
        f"{name} of shape {list(state[name].shape)}, expected {list(shape)}"
        for name, shape in expected.items()
        if name in state and state[name].shape != shape
    ]
    if faults:
        more = f" and {len(faults) - 5} more" if len(faults) > 5 else ""
        raise ValueError(f"{source}: does not fit the network: {'; '.join(faults[:5])}{more}")


def _digest(tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> str:
    sha = hashlib.sha256(json.dumps(dict(header), sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        sha.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()
