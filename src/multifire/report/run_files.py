"""A run's folder as a reader finds it: its intact files, and notes on the rest.

The folder may come from a stranger, so nothing in it is trusted: files are read up to a size, values of an unexpected
type become None or an empty list, and names lose characters that are not printable.
"""

import json
from pathlib import Path
from typing import Any

from multifire.config import RunConfig, json_format
from multifire.config.architecture import is_buildable
from multifire.config.json_format import flatten_config
from multifire.datasets import DATASETS
from multifire.report.values import MAX_ENTRIES, Table, clean, number, plain
from multifire.utils.files import write_json

MAX_FILE_BYTES = 64 * 2**20
"""Larger files are not read."""
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
"""Layout of an analysis, see `multifire.analysis`."""
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
ANALYSIS_MISSING = "`multifire report RUN` measures the network if its checkpoint and its data are available"


class RunFiles:
    """Content of a run's folder: `config`, `summary`, `metrics`, `analysis`, `notes`.

    Raises:
        FileNotFoundError: no such folder, or no run in it.
        ValueError: none of the run's files can be read.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.notes: list[str] = []
        """Sentences on what is missing or damaged, and how to get it."""
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
        analysed = self._can_be_analysed()
        history_missing, analysis_missing = (HISTORY_MISSING, ANALYSIS_MISSING) if analysed else ("", "")
        self.history: list[dict[str, Any]] = self._read_lines("analysis.jsonl", ANALYSIS, history_missing)
        self.analysis = self._read_object("analysis.json", ANALYSIS, analysis_missing)
        self.evaluations = [
            found
            for file in sorted(self.path.glob("eval-*.json"))[:8]
            if (found := self._read_object(file.name, EVALUATION))
        ]

    def _read_config(self) -> tuple[RunConfig | None, dict[str, Any]]:
        """Return the configuration, or None if it is invalid, and its fields by their full names."""
        text = self._text("config.json", "its configuration is unknown")
        if text is None:
            return None, {}
        try:
            cfg, fields = json_format.from_json(text, "config.json"), json.loads(text)
        except ValueError as error:
            self.notes.append(f"{plain(error)}.")
            cfg, fields = None, _parse(text)
        fields = flatten_config(fields) if isinstance(fields, dict) and _depth(fields) < 8 else {}
        fields.pop("version", None)
        listed = list(fields.items())[:MAX_ENTRIES]
        return cfg, {plain(key): value if number(value) is not None else plain(value) for key, value in listed}

    def _can_be_analysed(self) -> bool:
        """Return False, with a note, for a network that is not one of multifire's."""
        name = str(self.fields.get("model.name", ""))
        if not name or is_buildable(name):
            return True
        self.notes.append(f"The layers of {name} are not analysed: it is not one of multifire's networks.")
        return False

    def _read_object(self, name: str, spec: dict[str, Any], missing: str = "") -> dict[str, Any]:
        """Return the JSON object of a file in the shape of `spec`, or an empty one."""
        text = self._text(name, missing)
        found = None if text is None else _parse(text)
        if text is not None and not isinstance(found, dict):
            self.notes.append(f"{plain(name)} is damaged, and ignored.")
        if found == {}:
            self.notes.append(f"{plain(name)} is empty.")
        return clean(found, spec) if isinstance(found, dict) and found else {}

    def _read_lines(self, name: str, spec: Any, missing: str) -> list[dict[str, Any]]:
        """Return one record for each epoch from a file with a JSON object in each line; skip damaged lines.

        A resumed run may have an epoch twice; the later record counts.
        """
        lines = (self._text(name, missing) or "").splitlines()
        found = [_parse(line) for line in lines if line]
        records = [r for r in found if isinstance(r, dict) and type(r.get("epoch")) is int and abs(r["epoch"]) < 10**9]
        if len(records) < len(found):
            self.notes.append(f"{len(found) - len(records):,} damaged lines of {name} are ignored.")
        return [clean(record, spec) for record in {r["epoch"]: r for r in records}.values()]

    def _text(self, name: str, missing: str) -> str | None:
        path = self.path / name
        try:
            if not path.is_file():
                if missing:
                    self.notes.append(f"{name} is missing: {missing}.")
                return None
            if path.stat().st_size > MAX_FILE_BYTES:
                self.notes.append(f"{plain(name)} has more than {MAX_FILE_BYTES >> 20} MB, and is ignored.")
                return None
            return path.read_text(encoding="utf-8", errors="replace")
        except OSError as error:
            self.notes.append(f"{plain(name)} cannot be read: {error.strerror}.")
            return None

    def measured(self, analysis: dict[str, Any]) -> None:
        """Use a new analysis, and store it in the run's folder if that is writable."""
        self.analysis = clean(analysis, ANALYSIS)
        self.notes = [note for note in self.notes if ANALYSIS_MISSING not in note]
        try:
            write_json(self.path / "analysis.json", analysis)
        except OSError as error:
            self.notes.append(f"The analysis made for this page could not be kept: {error.strerror}.")

    @property
    def headline(self) -> dict[str, Any]:
        """The newest analysis; empty if there is none."""
        return self.analysis or (self.history[-1] if self.history else {})

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes; empty for an unknown data set."""
        known = DATASETS.get(str(self.fields.get("data.name", self.summary.get("data"))))
        own = self.fields.get("data.classes")
        return known.classes if known else tuple(map(str, own)) if isinstance(own, list) else ()

    def class_name(self, label: int) -> str:
        return self.classes[label] if label < len(self.classes) else str(label)

    @property
    def simulated(self) -> bool:
        """True if the events were simulated."""
        known = DATASETS.get(str(self.fields.get("data.name")))
        return known.simulated if known else bool(self.summary.get("simulated"))

    @property
    def accuracy(self) -> float | None:
        """Accuracy of the summary or, for an unfinished run, of the last epoch."""
        if self.summary and self.summary["test_accuracy"] is not None:
            return self.summary["test_accuracy"]
        last = self.metrics[-1] if self.metrics else {}
        return number(last.get("test_accuracy", last.get("validation_accuracy")))

    def __repr__(self) -> str:
        accuracy = "no accuracy yet" if self.accuracy is None else f"{100 * self.accuracy:.2f} %"
        return f"Run({self.name!r}: {self.describe()}; {accuracy} after {len(self.metrics)} epochs)"

    def describe(self) -> str:
        """Return network and data in one line."""
        field = self.fields.get
        data = f"{field('data.name', 'unknown data')}{' (simulated)' * self.simulated}"
        return f"{field('model.name', 'unknown network')}, K = {field('model.levels', '?')}, {data}"


def _parse(text: str) -> Any:
    """Return the parsed JSON; None if it is invalid."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _depth(tree: Any) -> int:
    """Return the nesting depth of objects."""
    depth, level = 0, [tree]
    while level := [item for value in level if isinstance(value, dict) for item in value.values()]:
        depth += 1
    return depth
