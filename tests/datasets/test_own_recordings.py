"""Own recordings of event cameras in folders of classes."""

import shutil
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from multifire import datasets
from multifire.cli import main
from multifire.config import DataConfig, RunConfig, get_recipe
from multifire.datasets.cache import cache_folder, cache_options, command
from multifire.datasets.prepare import prepare
from multifire.events import read_events, to_frames
from multifire.experiments.plan import plan
from tests.datasets.makers import aedat2, nmnist_record
from tests.events.event_files import sensor_events
from tests.test_train import override

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


def test_a_plan_counts_the_samples(tmp_path):
    root = make(tmp_path)
    cfg = override(RunConfig(data=config(root)), model={"name": "ds_resnet8", "width": 2}, optim={"batch_size": 3})
    full = datasets.complete(cfg, load(root, cfg.data))
    assert plan(full).steps_per_epoch == 3  # of 8 recordings


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


def davis_files(root: Path, width: int = 346, height: int = 260) -> np.ndarray:
    """Write two classes of DAVIS recordings whose files do not state their size; return the events of the first."""
    first = None
    for kind in ("wave", "clap"):
        (root / kind).mkdir(parents=True)
        for number in range(3):
            events = sensor_events(width, height, 800, seed=number)
            first = events if first is None else first
            np.save(root / kind / f"{number}.npy", events)
    assert first is not None
    return first


def test_strays_are_refused_or_dropped_and_counted(tmp_path, caplog):
    davis_files(tmp_path)
    events = np.load(tmp_path / "wave/1.npy")
    events["x"][[10, 500, 700]] = 400
    np.save(tmp_path / "wave/1.npy", events)
    cfg = config(tmp_path, sensor="346x260")
    with pytest.raises(ValueError, match=r"wave/1.npy: .*; 3 events of 800 lie beside it.*--data.stray drop"):
        prepare(cfg, tmp_path, workers=1)
    dropped = replace(cfg, stray="drop")
    assert cache_folder(dropped, tmp_path) != cache_folder(cfg, tmp_path)
    data = load(tmp_path, dropped)
    told = [record.getMessage() for record in caplog.records if "beside the sensor" in record.getMessage()]
    assert told == [f"{tmp_path}/wave/1.npy: 3 events beside the sensor of 346 × 260 were dropped"]
    total = sum(int(split.frames.sum()) for split in (data.train, data.test))
    assert total == 6 * 800 - 3


def test_a_wide_sensor_is_padded_unless_told_otherwise(tmp_path, capsys):
    events = davis_files(tmp_path)
    made = {fit: load(tmp_path, config(tmp_path, sensor="346x260", fit=fit)) for fit in ("pad", "crop", "stretch")}
    assert load(tmp_path, config(tmp_path, sensor="346x260")).train.frames.tolist() == made["pad"].train.frames.tolist()
    split, row = next(
        (split, int(np.flatnonzero(split.names == "wave/0.npy")[0]))
        for split in (made["pad"].train, made["pad"].test)
        if "wave/0.npy" in split.names
    )
    padded = events.copy()
    padded["y"] += 43
    expected = to_frames(padded, (346, 346), (16, 16), timesteps=5, slicing="time")
    assert np.array_equal(split.frames[row], expected)
    flipped = load(tmp_path, config(tmp_path, sensor="346x260", flip_y=True))
    assert np.array_equal(flipped.train.frames, made["pad"].train.frames[..., ::-1, :])
    assert made["crop"].train.frames.sum() < made["pad"].train.frames.sum() == made["stretch"].train.frames.sum()
    options = ["--root", str(tmp_path), "--timesteps", "5", "--frame-size", "16", "--slicing", "time"]
    options += ["--sensor", "346x260", "--fit", "crop"]
    capsys.readouterr()
    assert main(["data", "info", "recordings", *options]) == 0
    assert "sensor 346×260, cropped to 260×260 to fill frames of 16×16" in capsys.readouterr().out


def test_info_names_hot_pixels_and_drop_leaves_them_out(tmp_path, capsys):
    davis_files(tmp_path, 34, 20)
    path = tmp_path / "wave/0.npy"
    hot = sensor_events(1, 1, 500, seed=9)
    hot["x"], hot["y"] = 33, 7
    events = np.concatenate([np.load(path), hot])
    np.save(path, events[np.argsort(events["t"], kind="stable")])
    assert main(["data", "info", str(path), "--sensor", "34x20"]) == 0
    out = capsys.readouterr().out
    assert "format npy, sensor 34×20" in out
    assert "1,300 events in" in out
    assert "hot pixels: 1, 38" in out
    assert "(33, 7): 501" in out or "(33, 7): 50" in out
    assert main(["data", "info", str(path)]) == 0
    assert "sensor size not stated; give it with --sensor" in capsys.readouterr().out
    kept, dropped = (load(tmp_path, config(tmp_path, sensor="34x20", hot_pixels=what)) for what in ("keep", "drop"))
    counts = [sum(int(split.frames.sum(dtype=int)) for split in (data.train, data.test)) for data in (kept, dropped)]
    assert 500 <= counts[0] - counts[1] <= 510


def test_earlier_caches_of_public_data_sets_stay_valid():
    cfg = get_recipe("dvs-gesture").data
    assert "stray" not in cache_options(cfg)
    assert cache_options(replace(cfg, stray="drop"))["stray"] == "drop"
    assert command(replace(cfg, flip_x=True, stray="drop"), Path("data")).endswith("--stray drop --flip-x")
