"""Save a network as a folder to share, and load it: model.safetensors, config.json and a model card, README.md.

Hugging Face's hub expects these file names; `hub.py` uploads and downloads such folders. model.safetensors contains a
digest of the weights and one of config.json.
"""

import dataclasses
import hashlib
import html
import json
from pathlib import Path
from typing import Any

from torch import nn

from multifire.config import ModelConfig
from multifire.config.json_format import model_config
from multifire.config.parameters import count_parameters
from multifire.export import hub
from multifire.export.provenance import KEY, KEYS, describe, read_provenance, stored
from multifire.export.shipped import shipped_names, shipped_run
from multifire.nn import SpikingNetwork, config_of_model, model_from_config
from multifire.training.load_run import load_run
from multifire.utils.files import write_atomic, write_json
from multifire.utils.tensor_files import check_keys, read_tensors, write_tensors

PRETRAINED_VERSION = 1
KIND = "pretrained"
MAX_CONFIG_BYTES = 1 << 20
"""Maximum size of config.json: parsed JSON takes many times its size in memory."""


def save_pretrained(model: SpikingNetwork, folder: str | Path, provenance: dict[str, Any] | None = None) -> None:
    """Save the network and its provenance in a folder, which is created if necessary.

    Raises:
        FileExistsError: the folder has files of the same names that are no saved network's.
        ValueError: the network is folded.
    """
    folder = Path(folder)
    in_the_way = [name for name in ("config.json", "README.md") if (folder / name).exists()]
    if in_the_way and not (folder / "model.safetensors").exists():
        raise FileExistsError(f"{folder} holds another {in_the_way[0]}; choose a new folder")
    cfg = config_of_model(model)
    expected = {name: tensor.shape for name, tensor in model_from_config(cfg).state_dict().items()}
    check_keys(model.state_dict(), expected, "the network (save the trained one, not a folded copy)")
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", {"model": dataclasses.asdict(cfg), KEY: provenance})
    config_digest = hashlib.sha256((folder / "config.json").read_bytes()).hexdigest()
    header = {"multifire": str(PRETRAINED_VERSION), "kind": KIND, "config.json": config_digest}
    write_tensors(folder / "model.safetensors", model.state_dict(), header)
    write_atomic(folder / "README.md", card(model, provenance).encode())


def from_pretrained(source: str | Path, backend: str = "auto", *, revision: str | None = None) -> SpikingNetwork:
    """Load a network that `save_pretrained` wrote, in evaluation mode.

    Args:
        source: a folder; or a network that the package contains, such as "digits"; or "owner/name" on Hugging Face's
            hub. An existing folder of that name takes precedence.
        backend: "auto" or a name in `multifire.ops.BACKENDS`.
        revision: branch, tag or commit hash on the hub.

    Raises:
        FileNotFoundError: no such folder, network or revision, or a file in it is missing.
        ValueError: a damaged file, tensors that do not fit the configuration, or the extra `hub` is not installed.
    """
    if revision is None and not Path(source).is_dir() and str(source) in shipped_names():
        return load_run(shipped_run(str(source)), backend=backend).model
    on_hub = revision is not None or (hub.is_name(source) and not Path(source).is_dir())
    folder = hub.download(str(source), revision) if on_hub else Path(source)
    path = folder / "config.json"
    cfg, _ = _read_config(path)
    weights = folder / "model.safetensors"
    header, tensors = read_tensors(weights, {KIND: PRETRAINED_VERSION})
    numbers = sum(tensor.numel() for tensor in tensors.values())
    if count_parameters(cfg) > numbers:  # checked before memory is allocated
        expected = f"{path.name} describes a network of {count_parameters(cfg):,} or more"
        raise ValueError(f"{weights}: contains {numbers:,} numbers, {expected}")
    _check_digest(path, header)
    model = model_from_config(cfg, backend)
    check_keys(tensors, {name: tensor.shape for name, tensor in model.state_dict().items()}, str(weights))
    model.to(tensors["voting.weight"].dtype).load_state_dict(tensors)
    return model.eval()


def inspect_folder(folder: Path) -> tuple[str, dict[str, Any]]:
    """Check the digests of a folder's weights and config.json; return its content, in words, and its provenance.

    Raises:
        FileNotFoundError: config.json is missing.
        ValueError: damaged, altered, not a folder of `save_pretrained`, or saved without provenance.
    """
    path, weights = folder / "config.json", folder / "model.safetensors"
    if not weights.is_file():
        expected = f"one that save_pretrained wrote, or a file such as {folder.name}/last.safetensors"
        raise ValueError(f"{folder}: a folder without {weights.name}, expected {expected}")
    cfg, provenance = _read_config(path)
    header, tensors = read_tensors(weights, {KIND: PRETRAINED_VERSION})
    _check_digest(path, header)
    if provenance is None:
        raise ValueError(f"{folder}: intact, but saved without provenance: the origin of this {cfg.name} is unknown")
    return f"{KIND}, {len(tensors)} tensors, {sum(t.numel() for t in tensors.values()):,} numbers", provenance


def _check_digest(config: Path, header: dict[str, str]) -> None:
    if header.get("config.json") != hashlib.sha256(config.read_bytes()).hexdigest():
        raise ValueError(
            f"{config}: altered: model.safetensors contains no digest, or another one; save the network again"
        )


def _read_config(path: Path) -> tuple[ModelConfig, dict[str, Any] | None]:
    """Return the network's configuration and the provenance in config.json."""
    if not path.is_file():
        raise FileNotFoundError(f"{path.parent}: contains no config.json; expected a folder that save_pretrained wrote")
    if path.stat().st_size > MAX_CONFIG_BYTES:
        raise ValueError(
            f"{path}: has {path.stat().st_size:,} bytes, expected a configuration of at most {MAX_CONFIG_BYTES:,}"
        )
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        model, provenance = values["model"], stored(values)
        if not any(key in values for key in KEYS):
            raise KeyError(KEY)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{path}: not the configuration of a network ({error})") from None
    cfg = model_config(model, str(path))
    return cfg, None if provenance is None else read_provenance(json.dumps(provenance), str(path))


def push_to_hub(folder: str | Path, name: str, *, private: bool = False) -> str:
    """Upload a folder that `save_pretrained` wrote to Hugging Face's hub as "owner/name"; return the commit's hash.

    Only weights, configuration and model card are uploaded. `private` applies only to a new repository.

    Raises:
        FileNotFoundError: no such folder, or a file in it is missing.
        OSError: the hub refuses or cannot be reached.
        ValueError: a damaged file, not a name on the hub, or the extra `hub` is not installed.
    """
    from_pretrained(Path(folder))  # raises if the folder could not be loaded again
    return hub.upload(Path(folder), name, private)


def card(model: nn.Module, provenance: dict[str, Any] | None, name: str = "this folder, or its name on the hub") -> str:
    """Return the model card: a Markdown page with provenance, size and how to load the network by its name."""
    numbers = sum(parameter.numel() for parameter in model.parameters())
    facts = [f"- **{name}**: {html.escape(text)}" for name, text in describe(provenance)] if provenance else []
    lines = [
        "---",
        "library_name: multifire",
        "tags: [spiking-neural-network, mlf, ds-resnet]",
        "---",
        "# A deep spiking network of multi-level firing neurons",
        "",
        *(facts or ["The training data are not recorded."]),
        f"- **parameters**: {numbers:,}",
        "",
        "```python",
        "import multifire as mf",
        "",
        f'model = mf.from_pretrained("{name}")',
        "logits = model(frames)  # [T, N, C, H, W] -> [N, classes]",
        "```",
        "",
    ]
    return "\n".join(lines)
