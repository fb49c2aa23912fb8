"""Compare finished runs: the fields in which they differ, and their results."""

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from multifire.config import RunConfig, json_format
from multifire.config.json_format import flatten_config
from multifire.utils.files import write_atomic

ALWAYS_SHOWN = ("recipe", "seed")


def compare(folders: Sequence[Path]) -> list[dict[str, Any]]:
    """Return a row for each run: its folder, the configuration fields that differ between the runs, and its results.

    Raises:
        FileNotFoundError: a folder holds no finished run.
        ValueError: a damaged file.
    """
    runs = [(folder, *_read(folder)) for folder in folders]
    fields = [flatten_config(asdict(cfg)) for _, cfg, _ in runs]
    differing = [key for key in fields[0] if key in ALWAYS_SHOWN or len({repr(field.get(key)) for field in fields}) > 1]
    return [
        {"run": str(folder), **{key: field.get(key) for key in differing}, **results}
        for (folder, _, results), field in zip(runs, fields, strict=True)
    ]


def write_csv(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write the rows as CSV with a header line."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomic(path, text.getvalue().encode())


def _read(folder: Path) -> tuple[RunConfig, dict[str, Any]]:
    summary, config = folder / "summary.json", folder / "config.json"
    if not summary.is_file() or not config.is_file():
        raise FileNotFoundError(
            f"{folder}: no finished run here, expected config.json and summary.json; give the folder of a finished run"
        )
    try:
        cfg = json_format.from_json(config.read_text(encoding="utf-8"), str(config))
        figures = json.loads(summary.read_text(encoding="utf-8"))
        results = {
            "test accuracy %": round(100 * figures["test_accuracy"], 2),
            "of checkpoint": str(figures["test_accuracy_of"]),
            "epochs": int(figures["epochs"]),
            "parameters": int(figures["parameters"]),
            "images/s": round(figures["images_per_second"], 1),
        }
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError, KeyError, TypeError) as error:
        raise ValueError(f"{summary}: not a run's summary ({error!r}); train again, or leave the run out") from None
    return cfg, results
