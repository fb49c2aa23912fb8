"""A model's passport: what an exported file says of its recipe, data, accuracy, versions and checkpoint.

It is a JSON object. Files of multifire's own keep it in the safetensors header, other formats keep the same text among
their metadata; a digest over the whole content lies beside it.
"""

import dataclasses
import json
import platform
from pathlib import Path
from typing import Any

import torch

from multifire import __version__
from multifire.config import RunConfig
from multifire.datasets import get_info
from multifire.training.checkpoint import CHECKPOINT_VERSION, Checkpoint, load_checkpoint
from multifire.training.run_folder import RunFolder
from multifire.utils.device import processor
from multifire.utils.tensor_files import digest_of

PROVENANCE_VERSION = 1
KINDS = {"checkpoint": CHECKPOINT_VERSION, "int8": 1}
"""What our own files may hold, and the version of each that is read."""

ENERGY = ("snn_pj", "synops", "macs", "ac_pj", "mac_pj")
"""What of an analysis's energy a passport says."""


def make_provenance(folder: Path, which: str | None = None) -> dict[str, Any]:
    """The passport of what is exported of a run's checkpoint, "best" or "last"; None is the one its summary quotes.

    Raises:
        FileNotFoundError: no run there, or no such checkpoint in it.
        ValueError: the checkpoint is damaged.
    """
    run = RunFolder(folder)
    which = which or run.headline()
    path = run.checkpoint(which)
    checkpoint = load_checkpoint(path)
    return provenance_of(path, checkpoint) | measured(path, checkpoint)


def provenance_of(path: Path, checkpoint: Checkpoint) -> dict[str, Any]:
    """What a checkpoint's file alone knows."""
    cfg = checkpoint.config
    info = get_info(cfg.data.name)
    return {
        "passport": PROVENANCE_VERSION,
        "recipe": cfg.recipe,
        "config": dataclasses.asdict(cfg),
        "data": {"name": cfg.data.name, "about": info.about, "simulated": info.simulated, "classes": info.classes},
        "accuracy": [],
        "checkpoint": {"file": path.name, "epochs": checkpoint.position.epoch, "sha256": digest_of(path)},
        "versions": {"multifire": __version__, "torch": torch.__version__, "python": platform.python_version()},
    }


def measured(path: Path, checkpoint: Checkpoint) -> dict[str, Any]:
    """What the files beside a checkpoint say of this very one: its accuracy, and its energy where it was analysed."""
    summary = _read_object(path.with_name("summary.json"))
    of = "best by validation" if path.stem == "best" else path.stem
    summarised = (summary.get("test_accuracy_of"), summary.get("epochs")) == (of, checkpoint.position.epoch)
    analysis = _read_object(path.with_name("analysis.json")) if summarised else {}
    return {
        "accuracy": measured_accuracy(path, checkpoint, summary if summarised else {}),
        "energy": energy_record(analysis) if analysis.get("checkpoint") == of else None,
    }


def measured_accuracy(path: Path, checkpoint: Checkpoint, summary: dict[str, Any]) -> list[dict[str, Any]]:
    """What `multifire eval`, or else the run's summary, says of this checkpoint; nothing where neither does."""
    scored = _read_object(path.with_name(f"eval-{path.stem}.json"))
    if scored.get("digest") == digest_of(path):
        return [accuracy_record(scored["accuracy"], "the checkpoint", checkpoint.config, "multifire eval")]
    if summary:
        return [accuracy_record(summary["test_accuracy"], "the checkpoint", checkpoint.config, "after training")]
    return []


def energy_record(analysis: dict[str, Any]) -> dict[str, Any] | None:
    """Of an analysis what a passport says of an inference's energy, in pJ, and of how it was counted."""
    energy = analysis.get("energy")
    kept = {name: energy.get(name) for name in ENERGY} if isinstance(energy, dict) else {}
    if not kept or not all(type(value) in (int, float) for value in kept.values()):
        return None
    return kept | {"on": f"{analysis.get('samples')} {analysis.get('split')} samples"}


def accuracy_record(share: float, of: str, cfg: RunConfig, how: str) -> dict[str, Any]:
    """An accuracy between 0 and 1 as a passport says it: of which network, on what, measured how."""
    on = f"{cfg.data.name}'s test set, T = {cfg.data.timesteps}"
    return {"value": share, "of": of, "on": on, "how": f"{how}, {processor()}"}


def read_provenance(text: str, source: str) -> dict[str, Any]:
    """The passport that a file holds as text.

    Raises:
        ValueError: no passport, one of another version, or one that lacks what each must say.
    """
    try:
        passport = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{source}: its passport is not JSON ({error})") from None
    version = passport.get("passport") if isinstance(passport, dict) else None
    if version != PROVENANCE_VERSION:
        raise ValueError(f"{source}: its passport is of version {version!r}, expected {PROVENANCE_VERSION}")
    missing = [key for key in ("recipe", "config", "data", "accuracy", "checkpoint", "versions") if key not in passport]
    if missing:
        raise ValueError(f"{source}: its passport does not say its {', '.join(missing)}")
    try:
        describe(passport)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{source}: its passport is malformed ({type(error).__name__}: {error})") from None
    return passport


def describe(passport: dict[str, Any]) -> list[tuple[str, str]]:
    """The passport as lines, name and text, for a reader."""
    checkpoint, data, versions = passport["checkpoint"], passport["data"], passport["versions"]
    accuracies = [
        f"{100 * one['value']:.2f} % of {one['of']} on {one['on']}; {one['how']}" for one in passport["accuracy"]
    ]
    model, energy = passport["config"]["model"], passport.get("energy")  # older passports say nothing of it
    return [
        ("recipe", str(passport["recipe"])),
        ("network", f"{model['name']}, width {model['width']}, K = {model['levels']}"),
        ("data", f"{data['name']}: {data['about']}"),
        *(("accuracy", line) for line in accuracies or ["not measured"]),
        ("energy", _energy_line(energy) if energy is not None else "not analysed"),
        ("checkpoint", f"{checkpoint['file']} after {checkpoint['epochs']} epochs, sha256 {checkpoint['sha256']}"),
        ("versions", ", ".join(f"{name} {version}" for name, version in versions.items())),
    ]


def _energy_line(energy: dict[str, Any]) -> str:
    accumulates = f"{energy['synops']:,.0f} accumulates of {energy['ac_pj']:.3g} pJ"
    products = f"{energy['macs']:,.0f} multiply-accumulates of {energy['mac_pj']:.3g} pJ"
    return (
        f"{energy['snn_pj'] / 1e6:,.3g} µJ an inference of the checkpoint, counted and not metered: "
        f"{accumulates} and {products} (45 nm), mean of {energy['on']}"
    )


def _read_object(path: Path) -> dict[str, Any]:
    """What lies beside the checkpoint; nothing where it is missing or no JSON object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
