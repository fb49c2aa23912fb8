"""Two small finished runs, and a folder that a stranger made."""

import json
from pathlib import Path

import pytest

from multifire.training.loop import train
from tests.test_train import TINY, override


@pytest.fixture(scope="session")
def runs(tmp_path_factory) -> list[Path]:
    """K = 1 and K = 3 on the embedded digits."""
    folders = [tmp_path_factory.mktemp("runs") / f"K{levels}" for levels in (1, 3)]
    for levels, folder in zip((1, 3), folders, strict=True):
        train(override(TINY, model={"levels": levels}, data={"limit": 64}, optim={"epochs": 2}), folder)
    return folders


EVIL = "<img src=x onerror=alert(1)></script><script>window.pwned=1</script>{{7*7}}%{x}$\\frac{"


@pytest.fixture
def stranger(tmp_path) -> Path:
    """A run's folder with markup in every name, numbers that are none, and values of other types than expected."""
    folder = tmp_path / "<b onmouseover=alert(1)>run<"
    folder.mkdir()
    (folder / "config.json").write_text(
        json.dumps(
            {"recipe": EVIL, "data": {"name": EVIL, "root": EVIL}, "model": {"name": EVIL, EVIL: [EVIL]}, "seed": EVIL}
        )
    )
    metrics = [
        {"epoch": i, "test_accuracy": 0.5, "test_loss": 1e308, "train_loss": "high", EVIL: EVIL} for i in range(3000)
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
        "name": EVIL,
        "dormant": "all",
        "rate": [[0.1, None], "x", [1e400]],
        "membrane": {"low": 0, "high": 1, "counts": [[1, -5, "a"]]},
    }
    analysis = {
        "dormant": [1],
        "layers": [layer, 7, None, {**layer, "dormant": 0.5}],
        "confusion": [[1, 2, 3], [0], "x"],
        "neuron": EVIL,
        "energy": {"snn_pj": 0, "ann_pj": 5, "connections": [{"name": EVIL, "synops": -1}]},
        "per_step": {"accuracy": EVIL},
    }
    (folder / "analysis.json").write_text(json.dumps(analysis))
    (folder / "analysis.jsonl").write_text("\n".join(json.dumps({"epoch": i, **analysis}) for i in range(3)))
    summary = {
        "data": EVIL,
        "test_accuracy": -3,
        "test_accuracy_of": EVIL,
        "machine": {EVIL: EVIL},
        "backends": EVIL,
        "best": 5,
        "train_seconds": 1e300,
        "parameters": 1e300,
        "per_class": [0.1, None, "x"],
    }
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "eval-<s>.json").write_text(json.dumps({"checkpoint": EVIL, "accuracy": 0.5, "count": 7}))
    (folder / "last.safetensors").write_bytes(b"\x00" * 100)
    return folder
