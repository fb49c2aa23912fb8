"""README.md: its figures are those of the CSV files, its Python runs, and its commands work as printed."""

import re
import shlex
from pathlib import Path

import numpy as np
import pytest

from benchmarks.readme import with_figures
from multifire.cli import main
from tests.datasets.makers import nmnist_zip
from tests.events.event_files import encode_aedat2, random_events

README = Path(__file__).parents[1] / "README.md"
TEXT = README.read_text()
COMMANDS = [
    line.split("  #")[0].strip().removeprefix(".venv/bin/")
    for line in TEXT.splitlines()
    if re.match(r" {4}(\.venv/bin/)?multifire ", line)
]
SHORT = ["--model.width", "2", "--data.limit", "64", "--optim.epochs", "1", "--data.timesteps", "2"]
SHORTENED = {"train": [*SHORT, "--track", "--eval-batch-size", "64"], "sweep": SHORT}
"""Further arguments of commands that would take minutes."""
ELSEWHERE = {
    "multifire data download cifar10": "tests/datasets/test_download.py downloads from a server on this machine",
    "multifire demo --events": "it trains for minutes; tests/test_events_training.py trains its recipe",
}


def test_it_is_short():
    assert len(TEXT.splitlines()) <= 120


def test_its_figures_are_those_of_the_csv_files():
    assert with_figures(TEXT) == TEXT, "run python -m benchmarks.readme"


def test_its_links_exist():
    for target in re.findall(r"\]\(([^)#]+)", TEXT):
        assert target.startswith("http") or (README.parent / target).exists(), target


def test_its_python_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    exec(compile(code, "README.md", "exec"), {})
    accuracy, dormant = map(float, capsys.readouterr().out.split()[-2:])
    assert 0.2 < accuracy <= 1
    assert 0 < dormant < 1


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """A folder with the files that the commands name: a few images of CIFAR-10, recordings, frames."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "data" / "cifar10" / "cifar-10-batches-bin"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name in (*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"):
        records = rng.integers(0, 256, (40, 1 + 3072), np.uint8)
        records[:, 0] = np.arange(40) % 10
        (folder / name).write_bytes(records.tobytes())
    nmnist_zip(tmp_path / "data" / "nmnist" / "nmnist.zip")
    (tmp_path / "recording.aedat").write_bytes(encode_aedat2(random_events(2000)))
    np.save(tmp_path / "frames.npy", rng.integers(0, 256, (1, 28, 28), np.uint8))
    return tmp_path


@pytest.mark.slow
def test_its_commands_work_as_printed(place, capfd):
    """In the order of the text, since later ones use what earlier ones wrote."""
    assert len(COMMANDS) >= 14
    for command in COMMANDS:
        if command in ELSEWHERE:
            continue
        _, *args = shlex.split(command)
        assert main([*args, *SHORTENED.get(args[0], [])]) == 0, f"{command}: {capfd.readouterr().err}"
