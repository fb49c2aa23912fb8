"""Own recordings of event cameras in folders of classes."""

import shutil
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from multifire import datasets
from multifire.cli import main
from multifire.config import DataConfig, RunConfig
from multifire.datasets.prepare import prepare
from multifire.events import read_events, to_frames
from tests.datasets.makers import aedat2, nmnist_record

REAL = Path(__file__).parents[3] / "shared" / "data" / "dvs128-aedat2.zip"
rng = np.random.default_rng(0)


def config(root: Path, **options) -> DataConfig:
    given = {"timesteps": 5, "frame_size": 16, "slicing": "time", **options}
    return DataConfig(name="recordings", root=str(root), **given)


def make(root: Path, count: int = 4, classes: tuple[str, ...] = ("wave", "clap")) -> Path:
    for kind in classes:
        for number in range(count):
            path = root / "train" / kind / f"{number}.aedat"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(aedat2(rng, 60))
        (root / "test" / kind).mkdir(parents=True)
        (root / "test" / kind / "0.aedat").write_bytes(aedat2(rng, 60))
    return root


def load(root: Path, cfg: DataConfig) -> datasets.Dataset:
    prepare(cfg, root, workers=1)
    return datasets.load("recordings", root, cfg)


def test_recordings_are_read_as_frames_with_their_classes(tmp_path):
    root = make(tmp_path)
    cfg = config(root)
    data = load(root, cfg)
    assert data.info.classes == ("clap", "wave")
    assert data.info.events
    assert (data.info.channels, data.info.height_width) == (2, (128, 128))
    assert data.train.labels.tolist() == [0, 1] * 4
    assert data.test.names.tolist() == ["test/clap/0.aedat", "test/wave/0.aedat"]
    events = read_events(root / "train/wave/0.aedat")
    expected = to_frames(events, (128, 128), (16, 16), timesteps=5, slicing="time")
    assert np.array_equal(data.train.frames[1], expected)
    assert datasets.describe(cfg) == data.info
    full = datasets.complete(RunConfig(data=cfg), data)
    assert (full.data.classes, full.data.shape) == (("clap", "wave"), (2, 128, 128))
    assert datasets.describe(full.data) == replace(data.info, published_sizes=(0, 0))
    again = load(root, full.data)
    assert again.info == data.info


def test_classes_in_another_order(tmp_path):
    root = make(tmp_path)
    data = load(root, config(root, classes=("wave", "clap")))
    assert data.info.classes == ("wave", "clap")
    assert data.train.labels.tolist() == [1, 0] * 4
    with pytest.raises(ValueError, match=r"classes clap wave, expected data.classes wave jump; give the data that"):
        datasets.load("recordings", root, config(root, classes=("wave", "jump")))


def test_changed_recordings_are_prepared_again(tmp_path, caplog):
    root = make(tmp_path)
    cfg = config(root)
    folder = prepare(cfg, root, workers=1)
    written = (folder / "cache.json").stat().st_mtime_ns
    prepare(cfg, root, workers=1)
    assert (folder / "cache.json").stat().st_mtime_ns == written
    (root / "train/wave/9.aedat").write_bytes(aedat2(rng, 60))
    with caplog.at_level("INFO", logger="multifire"):
        assert len(load(root, cfg).train) == 9
    assert "have changed; their frames are made again" in caplog.text


def test_bad_recordings_are_named_in_one_line(tmp_path):
    cfg = config(tmp_path)
    with pytest.raises(FileNotFoundError, match="holds no folder CLASS with recordings"):
        prepare(cfg, tmp_path, workers=1)
    with pytest.raises(FileNotFoundError, match="recordings is not prepared; run `multifire data prepare recordings"):
        datasets.load("recordings", tmp_path, cfg)
    one = make(tmp_path / "one", classes=("wave",))
    with pytest.raises(ValueError, match="holds one class, 'wave', expected at least two folders of recordings"):
        prepare(cfg, one, workers=1)
    root = make(tmp_path / "two")
    small = root / "train/wave/3.bin"
    small.write_bytes(nmnist_record(rng))
    with pytest.raises(ValueError, match=r"3.bin: its sensor is 34x34, expected 128x128 like .*0.aedat; take it away"):
        prepare(cfg, root, workers=1)
    with pytest.raises(ValueError, match=r"0.aedat: its sensor is 128x128, expected 346x260 as data.sensor says"):
        prepare(replace(cfg, sensor="346x260"), root, workers=1)
    small.write_bytes(b"")
    with pytest.raises(ValueError, match=r"3.bin: is empty"):
        prepare(cfg, root, workers=1)
    small.unlink()
    assert len(load(root, cfg).train) == 8


def test_commands(tmp_path, capsys):
    root = make(tmp_path)
    options = ["--root", str(root), "--timesteps", "5", "--frame-size", "16", "--slicing", "time"]
    assert main(["data", "prepare", "recordings", *options, "--workers", "1"]) == 0
    assert "recordings: 8 training and 2 test samples in" in capsys.readouterr().out.replace("\n", " ")
    assert main(["data", "info", "recordings", *options]) == 0
    assert "clap" in capsys.readouterr().out
    assert main(["data", "show", "recordings", "1", *options, "--out", str(tmp_path / "x.gif")]) == 0
    assert "train/wave/0.aedat: wave" in capsys.readouterr().out
    assert main(["data", "list"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in ("cifar100", "folder:", "npz:", "recordings:"))
    assert main(["data", "prepare", "folder"]) == 2


@pytest.mark.skipif(not REAL.is_file(), reason="needs the folder shared beside the repository")
def test_six_real_recordings_as_three_classes_of_two(tmp_path):
    with zipfile.ZipFile(REAL) as archive:
        archive.extractall(tmp_path / "all")
    for path in sorted((tmp_path / "all").iterdir()):
        folder = tmp_path / "own" / path.stem.rpartition("_")[0]
        folder.mkdir(parents=True, exist_ok=True)
        shutil.move(path, folder / path.name)
    root = tmp_path / "own"
    data = load(root, config(root, frame_size=32, timesteps=8))
    assert data.info.classes == ("clamp", "standing_up", "walking")
    assert sorted(data.train.labels.tolist()) == sorted(data.test.labels.tolist()) == [0, 1, 2]
    assert data.train.frames.shape == (3, 8, 2, 32, 32)
    assert data.train.frames.sum((1, 2, 3, 4)).min() > 1000
