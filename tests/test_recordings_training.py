"""Train on recordings: files of a DAVIS346 train to the same bits as the same events in memory."""

import json
import shutil
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

import multifire as mf
from multifire.cli import main
from multifire.config import RunConfig
from multifire.datasets.cache import frame_options
from multifire.datasets.prepare import prepare
from multifire.events import frames_of_windows
from multifire.training.load_run import load_run

sys.path.append(str(Path(__file__).parents[1] / "tools"))
from simulate_recordings import simulated, write_recordings  # pyright: ignore[reportMissingImports]

REAL = Path(__file__).parents[2] / "shared" / "data" / "dvs128-aedat2.zip"
SMALL = {"model.width": 4, "optim.epochs": 2, "optim.batch_size": 8, "data.frame_size": 32, "data.timesteps": 3}


def from_memory(split: str, count: int, cfg: RunConfig) -> tuple[np.ndarray, np.ndarray]:
    """Return the frames and labels of simulated digits that never were in a file."""
    frames, labels = [], []
    for label, recording in simulated(split, count):
        events = list(recording.packed())
        assert len(events) == 1

        def again(recording=recording, events=events) -> mf.events.Recording:
            return mf.events.Recording("memory", "simulated", recording.sensor_size, iter(events))

        frames.append(frames_of_windows(again, [(None, None)], frame_options(cfg.data))[0].counts)
        labels.append(label)
    return np.stack(frames), np.array(labels)


@pytest.mark.parametrize("format", ["aedat2", "npz"])
def test_files_of_a_davis346_train_to_the_bits_of_the_same_events_in_memory(tmp_path, format):
    write_recordings(tmp_path / "files", 20, 12, format)
    own = {"data.name": "recordings", "data.root": str(tmp_path / "files"), "data.fit": "crop"}
    own |= {"data.sensor": "346x260"} if format == "npz" else {}
    cfg = mf.recipe("digits-dvs", **SMALL, **own)
    prepare(cfg.data, Path(cfg.data.root), workers=1)
    loaded = mf.datasets.load("recordings", cfg.data.root, cfg.data)
    train, test = from_memory("train", 20, cfg), from_memory("test", 12, cfg)
    assert np.array_equal(loaded.train.frames, train[0])
    assert np.array_equal(loaded.test.frames, test[0])
    classes = [str(digit) for digit in range(10)]
    assert list(loaded.info.classes) == classes
    memory = mf.datasets.make_dataset("recordings", train, test, classes=classes)
    options = {"track": (), "analyze_every": 0}
    mf.train(cfg, tmp_path / "of-files", **options)
    mf.train(cfg, tmp_path / "of-memory", data=memory, **options)
    records = [(tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("of-files", "of-memory")]
    for ours, theirs in zip(*(map(json.loads, lines) for lines in records), strict=True):
        assert ours["train_loss"] == theirs["train_loss"]
        assert ours["test_accuracy"] == theirs["test_accuracy"]
    weights = [load_run(tmp_path / name, "last").model.state_dict() for name in ("of-files", "of-memory")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@pytest.mark.skipif(not REAL.is_file(), reason="needs the folder shared beside the repository")
def test_six_real_recordings_train_as_three_classes_of_two(tmp_path, capsys):
    with zipfile.ZipFile(REAL) as archive:
        archive.extractall(tmp_path / "all")
    for path in sorted((tmp_path / "all").glob("*.aedat")):
        folder = tmp_path / "own" / path.stem.rpartition("_")[0]
        folder.mkdir(parents=True, exist_ok=True)
        shutil.move(path, folder / path.name)
    data = ["--data.name", "recordings", "--data.root", str(tmp_path / "own"), "--data.timesteps", "8"]
    small = ["--model.width", "4", "--optim.epochs", "30", "--optim.batch-size", "3", "--data.frame-size", "32"]
    assert main(["train", "digits-dvs", *data, *small, "--out", str(tmp_path / "run")]) == 0
    cfg = load_run(tmp_path / "run", "last").cfg
    assert cfg.data.classes == ("clamp", "standing_up", "walking")
    assert (cfg.model.num_classes, cfg.data.shape) == (3, (2, 128, 128))
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line)["train_loss"] for line in lines]
    assert losses[-1] < 0.6 * losses[0]  # three samples can be learned by heart
    assert "3 training and 3 test" in " ".join(capsys.readouterr().out.split())
