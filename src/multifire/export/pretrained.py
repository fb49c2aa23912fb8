"""A network as a folder to share: model.safetensors, config.json and a model card, README.md.

The names are those that Hugging Face's hub expects, to which `hub.py` carries the folder and from where it brings one.
The weights carry a digest, as every file of ours does.
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
from multifire.export.provenance import describe, read_provenance
from multifire.nn import SpikingResNet, config_of_model, model_from_config
from multifire.utils.files import write_atomic, write_json
from multifire.utils.tensor_files import check_keys, read_tensors, write_tensors

PRETRAINED_VERSION = 1
KIND = "pretrained"
LARGEST_CONFIG = 1 << 20
"""Bytes of a config.json that is read: JSON takes many times its size in memory."""


def save_pretrained(model: SpikingResNet, folder: str | Path, passport: dict[str, Any] | None = None) -> None:
    """Write the network, and what its passport says of it, into a folder, which is made where it is not there.

    Raises:
        ValueError: the network is folded: share it as it was trained.
    """
    folder = Path(folder)
    cfg = config_of_model(model)
    expected = {name: tensor.shape for name, tensor in model_from_config(cfg).state_dict().items()}
    check_keys(model.state_dict(), expected, "the network, which is to be shared as it was trained,")
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", {"model": dataclasses.asdict(cfg), "passport": passport})
    described = hashlib.sha256((folder / "config.json").read_bytes()).hexdigest()
    header = {"multifire": str(PRETRAINED_VERSION), "kind": KIND, "config.json": described}
    write_tensors(folder / "model.safetensors", model.state_dict(), header)
    write_atomic(folder / "README.md", _card(model, passport).encode())


def from_pretrained(source: str | Path, backend: str = "auto", *, revision: str | None = None) -> SpikingResNet:
    """The network that `save_pretrained` wrote, in evaluation mode: of a folder, or "owner/name" on Hugging Face's hub.

    A folder that is there comes before a network of that name on the hub. `revision` pins one there: a branch, a tag,
    or a commit's hash, behind which nothing can change.

    Raises:
        FileNotFoundError: no such folder, network or revision, or a file is missing in it.
        ValueError: damaged, tensors that do not fit the configuration, or the extra `hub` is not installed.
    """
    on_hub = revision is not None or (hub.is_name(source) and not Path(source).is_dir())
    folder = hub.download(str(source), revision) if on_hub else Path(source)
    path = folder / "config.json"
    cfg, _ = _read_config(path)
    weights = folder / "model.safetensors"
    _, tensors = read_tensors(weights, {KIND: PRETRAINED_VERSION})
    held = sum(tensor.numel() for tensor in tensors.values())
    if count_parameters(cfg) > held:  # before memory is taken for it
        raise ValueError(f"{weights}: holds {held:,} numbers, {path.name} says {count_parameters(cfg):,} or more")
    model = model_from_config(cfg, backend)
    check_keys(tensors, {name: tensor.shape for name, tensor in model.state_dict().items()}, str(weights))
    model.to(tensors["voting.weight"].dtype).load_state_dict(tensors)
    return model.eval()


def inspect_folder(folder: Path) -> tuple[str, dict[str, Any]]:
    """What a folder holds, and its passport, where the digest in its weights is that of its weights and config.json.

    Raises:
        FileNotFoundError: a file is missing in it.
        ValueError: damaged, altered, not such a folder, or saved without a passport.
    """
    path, weights = folder / "config.json", folder / "model.safetensors"
    if not weights.is_file():
        wanted = f"one that save_pretrained wrote, or a file such as {folder.name}/last.safetensors"
        raise ValueError(f"{folder}: a folder, expected {wanted}")
    cfg, passport = _read_config(path)
    header, tensors = read_tensors(weights, {KIND: PRETRAINED_VERSION})
    if header.get("config.json") != hashlib.sha256(path.read_bytes()).hexdigest():
        raise ValueError(
            f"{path}: altered: {weights.name} was saved with another one, or before it kept a digest of it"
        )
    if passport is None:
        raise ValueError(f"{folder}: whole, but saved without a passport: {cfg.name}, it is not said where from")
    return f"{KIND}, {len(tensors)} tensors, {sum(t.numel() for t in tensors.values()):,} numbers", passport


def _read_config(path: Path) -> tuple[ModelConfig, dict[str, Any] | None]:
    """The network and the passport that config.json describes."""
    if not path.is_file():
        raise FileNotFoundError(f"{path.parent}: no config.json in it; expected a folder that save_pretrained wrote")
    if path.stat().st_size > LARGEST_CONFIG:
        raise ValueError(
            f"{path}: has {path.stat().st_size:,} bytes, expected a configuration of {LARGEST_CONFIG:,} at most"
        )
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        described, passport = values["model"], values["passport"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{path}: not the configuration of a network ({error})") from None
    cfg = model_config(described, str(path))
    return cfg, None if passport is None else read_provenance(json.dumps(passport), str(path))


def push_to_hub(folder: str | Path, name: str, *, private: bool = False) -> str:
    """Put a folder that `save_pretrained` wrote on Hugging Face's hub as "owner/name"; the commit's hash, to pin it by.

    Weights, configuration and model card go up and nothing else; `private` counts where the repository is new.

    Raises:
        FileNotFoundError: no such folder, or a file is missing in it.
        OSError: the hub refuses, or is not reached.
        ValueError: the folder is damaged, no such name can be, or the extra `hub` is not installed.
    """
    from_pretrained(Path(folder))  # nothing goes out that could not be read again
    return hub.upload(Path(folder), name, private)


def _card(model: nn.Module, passport: dict[str, Any] | None) -> str:
    numbers = sum(parameter.numel() for parameter in model.parameters())
    said = [f"- **{name}**: {html.escape(text)}" for name, text in describe(passport)] if passport else []
    lines = [
        "---",
        "library_name: multifire",
        "tags: [spiking-neural-network, mlf, ds-resnet]",
        "---",
        "# A deep spiking network of multi-level firing neurons",
        "",
        *(said or ["It is not said what it was trained on."]),
        f"- **parameters**: {numbers:,}",
        "",
        "```python",
        "import multifire as mf",
        "",
        'model = mf.from_pretrained("this folder, or its name on the hub")',
        "logits = model(frames)  # [T, N, C, H, W] -> [N, classes]",
        "```",
        "",
    ]
    return "\n".join(lines)
