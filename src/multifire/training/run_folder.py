"""Read and write a run's folder: config.json, metrics.jsonl, analysis.jsonl, checkpoints, summary.json."""

import contextlib
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from multifire.config import RunConfig, json_format
from multifire.config.json_format import flatten_config
from multifire.training.trackers import Tracker, check_trackers, start_trackers, warn_on_failure
from multifire.utils.files import lock_folder, write_atomic, write_json

# Fields that may differ when a run is resumed: they decide where it is computed, not what.
_MAY_CHANGE = {"device", "backend", "eval_batch_size", "data.root", "code"}


class RunFolder:
    """The files of one run."""

    def __init__(self, path: Path):
        self.path = path
        self.last = path / "last.safetensors"
        self.best = path / "best.safetensors"
        self._config = path / "config.json"
        self._metrics = path / "metrics.jsonl"
        self._analyses = path / "analysis.jsonl"
        self._trackers: list[Tracker] = []

    @contextlib.contextmanager
    def open_for_training(self, cfg: RunConfig, resume: bool, track: tuple[str, ...] | None = None) -> Iterator[None]:
        """Lock the folder for writing, create it unless `resume`, and delete what interrupted writes have left.

        Within the block, the trackers named by `track` receive the run's figures.

        Raises:
            FileExistsError: the folder is not empty and `resume` is False, or another process trains in it.
            FileNotFoundError: `resume` is True and the folder holds no run.
            ValueError: the run in the folder has another configuration, or a tracker is unknown or not installed.
        """
        check_trackers(track or ())
        if resume and not self.exists():
            raise FileNotFoundError(f"{self.path}: no run to resume here; leave out --resume to start one")
        if not resume:
            self._check_empty()
            self.path.mkdir(parents=True, exist_ok=True)
        with lock_folder(self.path):
            for temporary in self.path.glob(".*.tmp"):
                temporary.unlink(missing_ok=True)
            if resume:
                self.check_same(cfg)
            else:
                self._check_empty()  # again, under the lock: another process may have started a run since
                write_atomic(self._config, json_format.to_json(cfg).encode())
            with start_trackers(track, self.path, flatten_config(dataclasses.asdict(cfg))) as self._trackers:
                yield

    def exists(self) -> bool:
        """Return True if there is a run in the folder."""
        return self._config.is_file()

    def check_same(self, cfg: RunConfig) -> None:
        """Check that the run in the folder has this configuration.

        Raises:
            ValueError: it has another one; the message names the fields that differ.
        """
        _check_same(json_format.from_json(_read(self._config), str(self._config)), cfg, self.path)

    def _check_empty(self) -> None:
        if not self.path.exists():
            return
        if not self.path.is_dir() or any(not file.name.startswith(".") for file in self.path.iterdir()):
            raise FileExistsError(
                f"{self.path} exists; give --resume to continue it, or --out for another folder "
                '(in Python: resume="yes", out)'
            )

    def metrics(self) -> list[dict[str, Any]]:
        """Return one record for each finished epoch; a truncated last line is ignored.

        Raises:
            ValueError: another line is not the JSON record of an epoch.
        """
        return _read_records(self._metrics, "a metrics file")

    def analyses(self) -> list[dict[str, Any]]:
        """Return one record for each analysed epoch, in the layout that `multifire.analysis` describes."""
        return _read_records(self._analyses, "a file of analyses")

    def drop_records_from(self, epoch: int) -> None:
        """Delete the records of this epoch and of later ones, which will be trained again."""
        for path, records in ((self._metrics, self.metrics()), (self._analyses, self.analyses())):
            if path.is_file():
                kept = [record for record in records if record["epoch"] < epoch]
                write_atomic(path, "".join(json.dumps(record) + "\n" for record in kept).encode())

    def record(self, epoch: int, figures: dict[str, Any]) -> None:
        """Append one epoch's figures to metrics.jsonl, and send the numbers among them to the trackers."""
        _append(self._metrics, {"epoch": epoch, **figures})
        numbers = {name: value for name, value in figures.items() if isinstance(value, int | float)}
        for tracker in self._trackers:
            with warn_on_failure(tracker):
                tracker.log(epoch, numbers)

    def record_analysis(self, epoch: int, record: dict[str, Any]) -> None:
        """Append one epoch's analysis to analysis.jsonl."""
        _append(self._analyses, {"epoch": epoch, **record})

    def write_analysis(self, record: dict[str, Any]) -> None:
        """Write the analysis of the trained network to analysis.json."""
        write_json(self.path / "analysis.json", record)

    def write_summary(self, summary: dict[str, Any]) -> None:
        """Write summary.json, which marks the run as finished."""
        write_json(self.path / "summary.json", summary)

    def reported_checkpoint(self) -> str:
        """Return the checkpoint whose accuracy the summary reports: "best" with a validation split, else "last".

        Raises:
            FileNotFoundError: the folder holds no run.
        """
        if not self.exists():
            raise FileNotFoundError(f"{self.path}: no config.json there; give a folder that `multifire train` wrote")
        return "best" if json_format.from_json(_read(self._config), str(self._config)).data.validation else "last"

    def checkpoint(self, which: str) -> Path:
        """Return the file of the "last" or "best" checkpoint.

        Raises:
            FileNotFoundError: the folder does not exist or does not hold this checkpoint.
        """
        path = {"last": self.last, "best": self.best}[which]
        if not self.path.is_dir():
            raise FileNotFoundError(f"{self.path}: no such run folder; give one that `multifire train` wrote")
        if not path.is_file():
            raise FileNotFoundError(f"{self.path}: no {path.name} in this folder; give a run with a finished epoch")
        return path


def _read_records(path: Path, kind: str) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    lines = _read(path).splitlines(keepends=True)
    try:
        records = [json.loads(line) for line in lines if line.endswith("\n")]
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path}: not {kind}: {error}") from None
    if not all(isinstance(record, dict) and isinstance(record.get("epoch"), int) for record in records):
        raise ValueError(f'{path}: not {kind}: expected an object with an "epoch" in each line')
    return records


def _append(path: Path, record: dict[str, Any]) -> None:
    with path.open("a") as file:
        file.write(json.dumps(record, allow_nan=False) + "\n")


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"{path}: not a text file; restore it from a copy, or train again") from None


def _check_same(stored: RunConfig, given: RunConfig, path: Path) -> None:
    before, now = flatten_config(dataclasses.asdict(stored)), flatten_config(dataclasses.asdict(given))
    changed = [key for key in before if before[key] != now[key] and key not in _MAY_CHANGE]
    if changed:
        changes = "; ".join(f"{key} {before[key]!r} -> {now[key]!r}" for key in changed)
        raise ValueError(
            f"{path}: the run in this folder has another configuration ({changes}); "
            "leave out the override, or give --out for another folder"
        )
