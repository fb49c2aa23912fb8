"""A run's folder as a reader finds it: its intact files, and notes on the rest.

The folder may come from a stranger, so nothing in it is trusted: files are read up to a size, values of an unexpected
type become None or an empty list, and names lose characters that are not printable.
"""

import json
from pathlib import Path
from typing import Any

from multifire.config import RunConfig, json_format
from multifire.config.json_format import flatten_config
from multifire.datasets import DATASETS
from multifire.report.values import LONGEST, Table, clean, number, plain
from multifire.utils.files import write_json

LARGEST = 64 * 2**20
"""Bytes of a file that are read; a larger one is left out."""
LAYER = {
    "name": str,
    "shape": [float],
    "dormant": float,
    "rate": [[float]],
    "membrane": {"low": float, "high": float, "counts": [[float]], "below": [float], "above": [float]},
    "weight_grad_norm": float,
    "activation_grad_norm": float,
}
ENERGY = {
    **dict.fromkeys(("ac_pj", "mac_pj", "macs", "synops", "snn_pj", "ann_macs", "ann_pj"), float),
    **dict.fromkeys(("quantised_bits", "quantised_pj"), float),
    "connections": [{"name": str, "kind": str, "ann_macs": float, "macs": float, "synops": float}],
}
ANALYSIS = {
    "epoch": float,
    "split": str,
    "samples": float,
    "timesteps": float,
    "neuron": {"thresholds": [float], "decay": float, "surrogate": str, "width": float, "windows": [[float]]},
    "dormant": float,
    "layers": [LAYER],
    "gradient": {"loss": float, "weight_ratio": float, "activation_ratio": float, "voting_grad_norm": float},
    "per_step": {"samples": float, "accuracy": [float], "loss": [float]},
    "confusion": [[float]],
    "energy": ENERGY,
}
"""What `multifire.analysis` says of a network, see there."""
SUMMARY = {
    **dict.fromkeys(("recipe", "data", "test_accuracy_of"), str),
    **dict.fromkeys(("test_accuracy", "test_loss", "last_test_accuracy", "epochs", "parameters"), float),
    **dict.fromkeys(("skipped_steps", "train_seconds", "images_per_second", "processes"), float),
    "simulated": bool,
    "best": {"chosen_by": str, "accuracy": float, "epoch": float},
    "per_class": [float],
    "per_step": [float],
    "machine": dict,
    "backends": [str],
}
EVALUATION = {"checkpoint": str, "count": float, "loss": float, "accuracy": float, "per_class": [float]}
HISTORY_MISSING = "`multifire train ... --analyze-every 1` measures dormant units and gradients over the epochs"
ANALYSIS_MISSING = "`multifire report RUN` measures the network where its checkpoint and its data are there"


class RunFiles:
    """What is known of a run: `config`, `summary`, `metrics`, `analysis`, `notes`.

    Raises:
        FileNotFoundError: no such folder, or no run in it.
        ValueError: there are a run's files in it, and not one of them can be read.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.notes: list[str] = []
        """What is missing or damaged, and how to get it; one sentence each."""
        if not self.path.is_dir():
            raise FileNotFoundError(f"{self.path}: no such run folder")
        names = ("config.json", "metrics.jsonl", "summary.json")
        if not any((self.path / name).is_file() for name in names):
            raise FileNotFoundError(f"{self.path}: no run in this folder: expected {', '.join(names)} in it")
        self.name = plain(self.path.resolve().name)
        self.config, self.fields = self._read_config()
        self.metrics = Table(self._read_lines("metrics.jsonl", dict, "no epoch has finished"))
        self.summary = self._read_object("summary.json", SUMMARY, "the run has not finished")
        if not (self.fields or self.metrics or self.summary):
            raise ValueError(f"{self.path}: not a run: {' '.join(self.notes)}")
        self.history: list[dict[str, Any]] = self._read_lines("analysis.jsonl", ANALYSIS, HISTORY_MISSING)
        self.analysis = self._read_object("analysis.json", ANALYSIS, ANALYSIS_MISSING)
        self.evaluations = [
            found
            for file in sorted(self.path.glob("eval-*.json"))[:8]
            if (found := self._read_object(file.name, EVALUATION))
        ]

    def _read_config(self) -> tuple[RunConfig | None, dict[str, Any]]:
        """The configuration where it is one, and its fields by their whole names in any case."""
        text = self._text("config.json", "where it came from is unknown")
        if text is None:
            return None, {}
        try:
            cfg, fields = json_format.from_json(text, "config.json"), json.loads(text)
        except ValueError as error:
            self.notes.append(f"{plain(error)}.")
            cfg, fields = None, _parse(text)
        fields = flatten_config(fields) if isinstance(fields, dict) and _depth(fields) < 8 else {}
        fields.pop("version", None)
        listed = list(fields.items())[:LONGEST]
        return cfg, {plain(key): value if number(value) is not None else plain(value) for key, value in listed}

    def _read_object(self, name: str, spec: dict[str, Any], missing: str = "") -> dict[str, Any]:
        """The JSON object of a file in the shape of `spec`, or an empty one."""
        text = self._text(name, missing)
        found = None if text is None else _parse(text)
        if text is not None and not isinstance(found, dict):
            self.notes.append(f"{plain(name)} is damaged, and left out.")
        return clean(found, spec) if isinstance(found, dict) else {}

    def _read_lines(self, name: str, spec: Any, missing: str) -> list[dict[str, Any]]:
        """One record for each epoch, of a file that has a JSON object in each line; lines that are none are left out.

        A run that was resumed may have an epoch twice; the later record counts.
        """
        lines = (self._text(name, missing) or "").splitlines()
        found = [_parse(line) for line in lines if line]
        records = [r for r in found if isinstance(r, dict) and type(r.get("epoch")) is int and abs(r["epoch"]) < 10**9]
        if len(records) < len(found):
            self.notes.append(f"{len(found) - len(records):,} damaged lines of {name} are left out.")
        return [clean(record, spec) for record in {r["epoch"]: r for r in records}.values()]

    def _text(self, name: str, missing: str) -> str | None:
        path = self.path / name
        try:
            if not path.is_file():
                if missing:
                    self.notes.append(f"{name} is missing: {missing}.")
                return None
            if path.stat().st_size > LARGEST:
                self.notes.append(f"{plain(name)} has more than {LARGEST >> 20} MB, and is left out.")
                return None
            return path.read_text(encoding="utf-8", errors="replace")
        except OSError as error:
            self.notes.append(f"{plain(name)} cannot be read: {error.strerror}.")
            return None

    def measured(self, analysis: dict[str, Any]) -> None:
        """Take in an analysis that was made just now, and keep it beside the run where that may be written to."""
        self.analysis = clean(analysis, ANALYSIS)
        self.notes = [note for note in self.notes if ANALYSIS_MISSING not in note]
        try:
            write_json(self.path / "analysis.json", analysis)
        except OSError as error:
            self.notes.append(f"The analysis made for this page could not be kept: {error.strerror}.")

    @property
    def headline(self) -> dict[str, Any]:
        """The newest of the analyses there are; an empty one where there is none."""
        return self.analysis or (self.history[-1] if self.history else {})

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes; empty where the data set is unknown."""
        known = DATASETS.get(str(self.fields.get("data.name", self.summary.get("data"))))
        return known.classes if known else ()

    def class_name(self, label: int) -> str:
        return self.classes[label] if label < len(self.classes) else str(label)

    @property
    def simulated(self) -> bool:
        """Whether no camera saw the data."""
        known = DATASETS.get(str(self.fields.get("data.name")))
        return known.simulated if known else bool(self.summary.get("simulated"))

    @property
    def accuracy(self) -> float | None:
        """The summary's accuracy or, of a run that has not finished, its last epoch's."""
        if self.summary and self.summary["test_accuracy"] is not None:
            return self.summary["test_accuracy"]
        last = self.metrics[-1] if self.metrics else {}
        return number(last.get("test_accuracy", last.get("validation_accuracy")))

    def __repr__(self) -> str:
        accuracy = "no accuracy yet" if self.accuracy is None else f"{100 * self.accuracy:.2f} %"
        return f"Run({self.name!r}: {self.describe()}; {accuracy} after {len(self.metrics)} epochs)"

    def describe(self) -> str:
        """Network and data in one line."""
        field = self.fields.get
        data = f"{field('data.name', 'unknown data')}{' (simulated)' * self.simulated}"
        return f"{field('model.name', 'unknown network')}, K = {field('model.levels', '?')}, {data}"


def _parse(text: str) -> Any:
    """JSON; None where it is not."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _depth(tree: Any) -> int:
    """How deep objects are nested; `json.loads` bears no more than the interpreter does."""
    depth, level = 0, [tree]
    while level := [item for value in level if isinstance(value, dict) for item in value.values()]:
        depth += 1
    return depth
