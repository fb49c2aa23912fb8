"""Two small finished runs, and a run folder with malicious contents."""

import json
from pathlib import Path

import pytest

from multifire.training.loop import train
from tests.test_train import TINY, override


@pytest.fixture(scope="session")
def runs(tmp_path_factory) -> list[Path]:
    """Return the folders of networks with K = 1 and K = 3 that were trained on the embedded digits."""
    folders = [tmp_path_factory.mktemp("runs") / f"K{levels}" for levels in (1, 3)]
    for levels, folder in zip((1, 3), folders, strict=True):
        train(override(TINY, model={"levels": levels}, data={"limit": 64}, optim={"epochs": 2}), folder)
    return folders


HOSTILE_TEXT = "<img src=x onerror=alert(1)></script><script>window.pwned=1</script>{{7*7}}%{x}$\\frac{"


@pytest.fixture
def hostile_run(tmp_path) -> Path:
    """Return a run's folder with markup in every name, invalid numbers, and values of unexpected types."""
    folder = tmp_path / "<b onmouseover=alert(1)>run<"
    folder.mkdir()
    (folder / "config.json").write_text(
        json.dumps(
            {
                "recipe": HOSTILE_TEXT,
                "data": {"name": HOSTILE_TEXT, "root": HOSTILE_TEXT},
                "model": {"name": HOSTILE_TEXT, HOSTILE_TEXT: [HOSTILE_TEXT]},
                "seed": HOSTILE_TEXT,
            }
        )
    )
    metrics = [
        {"epoch": i, "test_accuracy": 0.5, "test_loss": 1e308, "train_loss": "high", HOSTILE_TEXT: HOSTILE_TEXT}
        for i in range(3000)
    ]
    lines = [json.dumps(record) for record in metrics]
    lines += [
        '{"epoch": 3000, "test_accuracy": NaN, "test_loss": Infinity}',
        '{"epoch": 1e999}',
        "[]",
        "{",
        '{"epoch": true}',
    ]
    lines += ['{"epoch": 3001, "test_loss": 1' + "0" * 400 + "}", '{"epoch": 9' + "9" * 5000 + "}", "[" * 50_000]
    (folder / "metrics.jsonl").write_text("\n".join(lines))
    layer = {
        "name": HOSTILE_TEXT,
        "dormant": "all",
        "rate": [[0.1, None], "x", [1e400]],
        "membrane": {"low": 0, "high": 1, "counts": [[1, -5, "a"]]},
    }
    analysis = {
        "dormant": [1],
        "layers": [layer, 7, None, {**layer, "dormant": 0.5}],
        "confusion": [[1, 2, 3], [0], "x"],
        "neuron": HOSTILE_TEXT,
        "energy": {"snn_pj": 0, "ann_pj": 5, "connections": [{"name": HOSTILE_TEXT, "synops": -1}]},
        "per_step": {"accuracy": HOSTILE_TEXT},
    }
    (folder / "analysis.json").write_text(json.dumps(analysis))
    (folder / "analysis.jsonl").write_text("\n".join(json.dumps({"epoch": i, **analysis}) for i in range(3)))
    summary = {
        "data": HOSTILE_TEXT,
        "test_accuracy": -3,
        "test_accuracy_of": HOSTILE_TEXT,
        "machine": {HOSTILE_TEXT: HOSTILE_TEXT},
        "backends": HOSTILE_TEXT,
        "best": 5,
        "train_seconds": 1e300,
        "parameters": 1e300,
        "per_class": [0.1, None, "x"],
    }
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "eval-<s>.json").write_text(json.dumps({"checkpoint": HOSTILE_TEXT, "accuracy": 0.5, "count": 7}))
    (folder / "last.safetensors").write_bytes(b"\x00" * 100)
    return folder
