"""The provenance of an exported file: recipe, data, accuracy, energy, versions and checkpoint.

It is a JSON object: in the header of our safetensors files, in the metadata of other formats. A digest over the whole
content lies beside it.
"""

import dataclasses
import json
import platform
from collections.abc import Mapping
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
"""Kinds of our own files, and the version of each that is read."""

KEY = "provenance"
"""Name of the provenance in files."""
KEYS = (KEY, "passport")
"""With its name in files of earlier versions."""
REQUIRED = ("recipe", "config", "data", "accuracy", "checkpoint", "versions")
ENERGY = ("snn_pj", "synops", "macs", "ac_pj", "mac_pj")
"""Fields of an analysis's energy that the provenance holds."""


def make_provenance(folder: Path, which: str | None = None) -> dict[str, Any]:
    """Return the provenance of a run's "best" or "last" checkpoint; None is the one that the summary quotes.

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
    """Return what a checkpoint's file itself says."""
    cfg = checkpoint.config
    info = get_info(cfg.data.name)
    return {
        KEY: PROVENANCE_VERSION,
        "recipe": cfg.recipe,
        "config": dataclasses.asdict(cfg),
        "data": {"name": cfg.data.name, "about": info.about, "simulated": info.simulated, "classes": info.classes},
        "accuracy": [],
        "checkpoint": {"file": path.name, "epochs": checkpoint.position.epoch, "sha256": digest_of(path)},
        "versions": {"multifire": __version__, "torch": torch.__version__, "python": platform.python_version()},
    }


def measured(path: Path, checkpoint: Checkpoint) -> dict[str, Any]:
    """Return the accuracy and energy that files beside a checkpoint record for exactly this checkpoint."""
    summary = _read_object(path.with_name("summary.json"))
    of = "best by validation" if path.stem == "best" else path.stem
    summarised = (summary.get("test_accuracy_of"), summary.get("epochs")) == (of, checkpoint.position.epoch)
    analysis = _read_object(path.with_name("analysis.json")) if summarised else {}
    return {
        "accuracy": measured_accuracy(path, checkpoint, summary if summarised else {}),
        "energy": energy_record(analysis) if analysis.get("checkpoint") == of else None,
    }


def measured_accuracy(path: Path, checkpoint: Checkpoint, summary: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the accuracy recorded by `multifire eval` or else by the run's summary; empty without a record."""
    scored = _read_object(path.with_name(f"eval-{path.stem}.json"))
    if scored.get("digest") == digest_of(path):
        return [accuracy_record(scored["accuracy"], "the checkpoint", checkpoint.config, "multifire eval")]
    if summary:
        return [accuracy_record(summary["test_accuracy"], "the checkpoint", checkpoint.config, "after training")]
    return []


def energy_record(analysis: dict[str, Any]) -> dict[str, Any] | None:
    """Return the energy of an inference in pJ and how it was counted; None if the analysis has no energy."""
    energy = analysis.get("energy")
    kept = {name: energy.get(name) for name in ENERGY} if isinstance(energy, dict) else {}
    if not kept or not all(type(value) in (int, float) for value in kept.values()):
        return None
    return kept | {"on": f"{analysis.get('samples')} {analysis.get('split')} samples"}


def accuracy_record(share: float, of: str, cfg: RunConfig, how: str) -> dict[str, Any]:
    """Return the record of an accuracy between 0 and 1: of which network, on which data, measured how."""
    on = f"{cfg.data.name}'s test set, T = {cfg.data.timesteps}"
    return {"value": share, "of": of, "on": on, "how": f"{how}, {processor()}"}


def stored(values: Mapping[str, Any], default: Any = None) -> Any:
    """Return the value that a header or JSON object stores as provenance, under its present or its earlier name."""
    return next((values[key] for key in KEYS if key in values), default)


def read_provenance(text: str, source: str) -> dict[str, Any]:
    """Parse the provenance of a file.

    Raises:
        ValueError: malformed, another version, or incomplete.
    """
    try:
        provenance = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{source}: its provenance is not JSON ({error})") from None
    version = stored(provenance) if isinstance(provenance, dict) else None
    if version != PROVENANCE_VERSION:
        raise ValueError(f"{source}: its provenance is of version {version!r}, expected {PROVENANCE_VERSION}")
    missing = [
        key for key in ("recipe", "config", "data", "accuracy", "checkpoint", "versions") if key not in provenance
    ]
    if missing:
        raise ValueError(f"{source}: its provenance does not say its {', '.join(missing)}")
    try:
        describe(provenance)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{source}: its provenance is malformed ({type(error).__name__}: {error})") from None
    return provenance


def describe(provenance: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the provenance as pairs of name and text for a reader."""
    checkpoint, data, versions = provenance["checkpoint"], provenance["data"], provenance["versions"]
    accuracies = [
        f"{100 * one['value']:.2f} % of {one['of']} on {one['on']}; {one['how']}" for one in provenance["accuracy"]
    ]
    model, energy = provenance["config"]["model"], provenance.get("energy")  # files of earlier versions lack it
    return [
        ("recipe", str(provenance["recipe"])),
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
    """Return the JSON object of a file; empty if the file is missing or holds none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
