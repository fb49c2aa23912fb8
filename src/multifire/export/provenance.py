"""The provenance of an exported file: recipe, data, accuracy, energy, versions and checkpoint.

It is a JSON object in the header of our safetensors files and in the metadata of other formats. A digest of the whole
content is stored beside it.
"""

import dataclasses
import json
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from multifire import __version__, datasets
from multifire.config import RunConfig
from multifire.training.checkpoint import CHECKPOINT_VERSION, Checkpoint, load_checkpoint
from multifire.training.run_folder import RunFolder
from multifire.utils.device import processor
from multifire.utils.tensor_files import digest_of

PROVENANCE_VERSION = 1
KINDS = {"checkpoint": CHECKPOINT_VERSION, "int8": 1}
"""Kinds of our safetensors files, and the accepted version of each."""

KEY = "provenance"
"""Key of the provenance in files, and of its version in the JSON object."""
KEYS = (KEY, "passport")
"""Keys that are read, the newest first; files of earlier versions have the second."""
REQUIRED = ("recipe", "config", "data", "accuracy", "checkpoint", "versions")
"""Fields that every provenance has, besides its version."""
ENERGY = ("snn_pj", "synops", "macs", "ac_pj", "mac_pj")
"""Fields of analysis.json's energy that the provenance contains."""


def make_provenance(folder: Path, which: str | None = None) -> dict[str, Any]:
    """Return the provenance of a run's "best" or "last" checkpoint; None selects the one that the summary reports.

    Raises:
        FileNotFoundError: the folder contains no run, or the run has no such checkpoint.
        ValueError: the checkpoint is damaged.
    """
    run = RunFolder(folder)
    which = which or run.reported_checkpoint()
    path = run.checkpoint(which)
    checkpoint = load_checkpoint(path)
    return provenance_of(path, checkpoint) | measurements_of(path, checkpoint)


def provenance_of(path: Path, checkpoint: Checkpoint) -> dict[str, Any]:
    """Return the provenance that follows from the checkpoint alone, without accuracy and energy."""
    cfg = checkpoint.config
    info = datasets.describe(cfg.data)
    return {
        KEY: PROVENANCE_VERSION,
        "recipe": cfg.recipe,
        "config": dataclasses.asdict(cfg),
        "data": {"name": cfg.data.name, "about": info.about, "simulated": info.simulated, "classes": info.classes},
        "accuracy": [],
        "checkpoint": {"file": path.name, "epochs": checkpoint.position.epoch, "sha256": digest_of(path)},
        "versions": {"multifire": __version__, "torch": torch.__version__, "python": platform.python_version()},
    }


def measurements_of(path: Path, checkpoint: Checkpoint) -> dict[str, Any]:
    """Return the accuracy and energy that the run's files record for exactly this checkpoint."""
    summary = _read_object(path.with_name("summary.json"))
    label = "best by validation" if path.stem == "best" else path.stem
    if (summary.get("test_accuracy_of"), summary.get("epochs")) != (label, checkpoint.position.epoch):
        summary = {}
    analysis = _read_object(path.with_name("analysis.json")) if summary else {}
    return {
        "accuracy": _measured_accuracy(path, checkpoint, summary),
        "energy": _energy_record(analysis) if analysis.get("checkpoint") == label else None,
    }


def _measured_accuracy(path: Path, checkpoint: Checkpoint, summary: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the accuracy that `multifire eval` recorded, else that of the run's summary; empty if there is neither."""
    evaluation = _read_object(path.with_name(f"eval-{path.stem}.json"))
    if evaluation.get("digest") == digest_of(path):
        return [accuracy_record(evaluation["accuracy"], "the checkpoint", checkpoint.config, "multifire eval")]
    if summary:
        return [accuracy_record(summary["test_accuracy"], "the checkpoint", checkpoint.config, "after training")]
    return []


def _energy_record(analysis: dict[str, Any]) -> dict[str, Any] | None:
    """Return the energy of an inference in pJ and the counts behind it; None if the analysis has no energy."""
    energy = analysis.get("energy")
    values = {name: energy.get(name) for name in ENERGY} if isinstance(energy, dict) else {}
    if not values or not all(type(value) in (int, float) for value in values.values()):
        return None
    return values | {"on": f"{analysis.get('samples')} {analysis.get('split')} samples"}


def accuracy_record(accuracy: float, of: str, cfg: RunConfig, how: str) -> dict[str, Any]:
    """Return the record of an accuracy between 0 and 1.

    Args:
        accuracy: the value.
        of: the network that was scored, in words.
        cfg: names the data set and T.
        how: the command that measured it; the processor is added.
    """
    on = f"{cfg.data.name}'s test set, T = {cfg.data.timesteps}"
    return {"value": accuracy, "of": of, "on": on, "how": f"{how}, {processor()}"}


def stored(values: Mapping[str, Any], default: Any = None) -> Any:
    """Return the value that a header or JSON object has under the first of KEYS that it contains."""
    return next((values[key] for key in KEYS if key in values), default)


def read_provenance(text: str, source: str) -> dict[str, Any]:
    """Parse and check the provenance of a file; `source` names the file in messages.

    Raises:
        ValueError: malformed, of another version, or incomplete.
    """
    try:
        provenance = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{source}: its provenance is not JSON ({error})") from None
    version = stored(provenance) if isinstance(provenance, dict) else None
    if version != PROVENANCE_VERSION:
        raise ValueError(f"{source}: its provenance is of version {version!r}, expected {PROVENANCE_VERSION}")
    missing = [key for key in REQUIRED if key not in provenance]
    if missing:
        raise ValueError(f"{source}: its provenance lacks {', '.join(missing)}")
    try:
        describe(provenance)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{source}: its provenance is malformed ({type(error).__name__}: {error})") from None
    return provenance


def describe(provenance: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the provenance as pairs of name and text, to be printed."""
    checkpoint, data, versions = provenance["checkpoint"], provenance["data"], provenance["versions"]
    accuracies = [
        f"{100 * record['value']:.2f} % of {record['of']} on {record['on']}; {record['how']}"
        for record in provenance["accuracy"]
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
    """Return the JSON object in a file; empty if the file is missing or contains something else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
