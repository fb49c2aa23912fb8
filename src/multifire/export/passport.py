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
from multifire.checkpoint import CHECKPOINT_VERSION, Checkpoint, digest_of, load_checkpoint
from multifire.config import RunConfig
from multifire.datasets import get_info
from multifire.runs import RunFolder
from multifire.runtime import processor

PASSPORT_VERSION = 1
KINDS = {"checkpoint": CHECKPOINT_VERSION, "int8": 1}
"""What our own files may hold, and the version of each that is read."""


def make_passport(folder: Path, which: str | None = None) -> dict[str, Any]:
    """The passport of what is exported of a run's checkpoint, "best" or "last"; None is the one its summary quotes.

    Raises:
        FileNotFoundError: no run there, or no such checkpoint in it.
        ValueError: the checkpoint is damaged.
    """
    run = RunFolder(folder)
    which = which or run.headline()
    path = run.checkpoint(which)
    checkpoint = load_checkpoint(path)
    return passport_of(path, checkpoint) | {"accuracy": measured_accuracy(path, checkpoint)}


def passport_of(path: Path, checkpoint: Checkpoint) -> dict[str, Any]:
    """What a checkpoint's file alone knows."""
    cfg = checkpoint.config
    info = get_info(cfg.data.name)
    return {
        "passport": PASSPORT_VERSION,
        "recipe": cfg.recipe,
        "config": dataclasses.asdict(cfg),
        "data": {"name": cfg.data.name, "about": info.about, "simulated": info.simulated, "classes": info.classes},
        "accuracy": [],
        "checkpoint": {"file": path.name, "epochs": checkpoint.position.epoch, "sha256": digest_of(path)},
        "versions": {"multifire": __version__, "torch": torch.__version__, "python": platform.python_version()},
    }


def measured_accuracy(path: Path, checkpoint: Checkpoint) -> list[dict[str, Any]]:
    """What `multifire eval`, or else the run's summary, says of this very checkpoint; nothing where neither does."""
    which = path.stem
    scored, summary = _read_object(path.with_name(f"eval-{which}.json")), _read_object(path.with_name("summary.json"))
    of_summary = ("best by validation" if which == "best" else which, checkpoint.position.epoch)
    if scored.get("digest") == digest_of(path):
        return [accuracy_record(scored["accuracy"], "the checkpoint", checkpoint.config, "multifire eval")]
    if (summary.get("test_accuracy_of"), summary.get("epochs")) == of_summary:
        return [accuracy_record(summary["test_accuracy"], "the checkpoint", checkpoint.config, "after training")]
    return []


def accuracy_record(share: float, of: str, cfg: RunConfig, how: str) -> dict[str, Any]:
    """An accuracy between 0 and 1 as a passport says it: of which network, on what, measured how."""
    on = f"{cfg.data.name}'s test set, T = {cfg.data.timesteps}"
    return {"value": share, "of": of, "on": on, "how": f"{how}, {processor()}"}


def read_passport(text: str, source: str) -> dict[str, Any]:
    """The passport that a file holds as text.

    Raises:
        ValueError: no passport, one of another version, or one that lacks what each must say.
    """
    try:
        passport = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{source}: its passport is not JSON ({error})") from None
    version = passport.get("passport") if isinstance(passport, dict) else None
    if version != PASSPORT_VERSION:
        raise ValueError(f"{source}: its passport is of version {version!r}, expected {PASSPORT_VERSION}")
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
    model = passport["config"]["model"]
    return [
        ("recipe", str(passport["recipe"])),
        ("network", f"{model['name']}, width {model['width']}, K = {model['levels']}"),
        ("data", f"{data['name']}: {data['about']}"),
        *(("accuracy", line) for line in accuracies or ["not measured"]),
        ("checkpoint", f"{checkpoint['file']} after {checkpoint['epochs']} epochs, sha256 {checkpoint['sha256']}"),
        ("versions", ", ".join(f"{name} {version}" for name, version in versions.items())),
    ]


def _read_object(path: Path) -> dict[str, Any]:
    """What lies beside the checkpoint; nothing where it is missing or no JSON object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
