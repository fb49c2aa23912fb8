"""N-Caltech101, DVS-Lip and ASL-DVS in the layouts of their authors, and data sets as other libraries keep them."""

import importlib.util
import io
import shutil
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from multifire import datasets
from multifire.cli import main
from multifire.config import RECIPES, DataConfig, get_recipe
from multifire.datasets.prepare import prepare
from multifire.datasets.registry import ASL_NAMES, CIFAR10_NAMES, DVS_LIP_NAMES, NCALTECH101_NAMES
from multifire.events import FrameOptions, frames_of_windows, open_recording, read_events
from tests.datasets.makers import aedat2, gesture_archive
from tests.events.event_files import NamedBytes

_TOOL = Path(__file__).parents[2] / "tools" / "make_event_archives.py"
_spec = importlib.util.spec_from_file_location("make_event_archives", _TOOL)
assert _spec
assert _spec.loader
archives = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(archives)


def small(name: str, **options) -> DataConfig:
    return replace(get_recipe(name).data, timesteps=3, frame_size=12, bin_factor=None, slicing="time", **options)


def load(root: Path, source: Path, cfg: DataConfig) -> datasets.Dataset:
    prepare(cfg, root, source, workers=1)
    return datasets.load(cfg.name, root, cfg)


def frames_of(content: bytes, name: str, size: tuple[int, int], **options) -> np.ndarray:
    given = FrameOptions((12, 12), 3, "time", fit="pad", **options)
    return frames_of_windows(lambda: open_recording(NamedBytes(content, name), name, size), [(None, None)], given)[
        0
    ].counts


def member(archive: Path, name: str) -> bytes:
    with zipfile.ZipFile(archive) as file:
        return file.read(name)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    dest = tmp_path_factory.mktemp("made")
    for name, make in archives.MAKERS.items():
        make(dest / name)
    return dest


def test_ncaltech101(made, tmp_path, caplog):
    data = load(tmp_path, made / "ncaltech101", small("ncaltech101"))
    assert data.info.classes == NCALTECH101_NAMES
    assert (len(data.train), len(data.test)) == (202, 101)  # no official split: one of three is held out
    assert sorted(set(data.test.labels.tolist())) == list(range(101))
    assert "the published data set has 6,967 and 1,742" in caplog.text
    held = "anchor/image_0001" in data.test.names
    split = data.test if held else data.train
    row = split.names.tolist().index("anchor/image_0001")
    content = member(made / "ncaltech101/Caltech101.zip", "Caltech101/anchor/image_0001.bin")
    assert np.array_equal(split.frames[row], frames_of(content, "a.bin", (180, 240)))
    assert split.labels[row] == NCALTECH101_NAMES.index("anchor")
    other = load(tmp_path, made / "ncaltech101", small("ncaltech101", split_seed=5))
    assert other.test.names.tolist() != data.test.names.tolist()


@pytest.mark.parametrize("column", [35, 37])
def test_a_first_column_that_reads_as_a_comment_sign_is_an_event(column):
    """The first byte of N-Caltech101's files is a column of up to 239; 35 is `#` and 37 is `%`."""
    content = bytes([column, 9, 0x80, 0, 7, 200, 100, 0, 0, 10])
    assert read_events(NamedBytes(content, "a.bin"), (180, 240)).tolist() == [(7, column, 9, 1), (10, 200, 100, 0)]


def test_ncaltech101_of_spikingjelly_gives_the_same_frames(made, tmp_path):
    ours = load(tmp_path / "ours", made / "ncaltech101", small("ncaltech101"))
    theirs = load(tmp_path / "theirs", made / "ncaltech101-spikingjelly", small("ncaltech101"))
    assert ours.train.names.tolist() == theirs.train.names.tolist()
    assert np.array_equal(ours.train.frames, theirs.train.frames)
    assert np.array_equal(ours.test.frames, theirs.test.frames)


def test_dvs_lip(made, tmp_path):
    data = load(tmp_path, made / "dvs-lip", small("dvs-lip"))
    assert data.info.classes == DVS_LIP_NAMES
    assert (len(data.train), len(data.test)) == (200, 100)
    assert data.test.names[7] == "test/around/0.npy"
    content = member(made / "dvs-lip/DVS-Lip.zip", "DVS-Lip/test/around/0.npy")
    assert np.array_equal(data.test.frames[7], frames_of(content, "0.npy", (128, 128)))
    assert data.test.labels[7] == DVS_LIP_NAMES.index("around") == 7


def test_asl_dvs_turns_the_pictures_the_right_way_up(made, tmp_path):
    data = load(tmp_path, made / "asl-dvs", small("asl-dvs"))
    assert data.info.classes == ASL_NAMES
    assert (len(data.train), len(data.test)) == (24 * 8, 24 * 2)
    name = data.train.names[0]
    letter, stem = name.split("/")
    file = next(
        file for file in (made / "asl-dvs").iterdir() if f"{letter}/{stem}.mat" in zipfile.ZipFile(file).namelist()
    )
    content = member(file, f"{letter}/{stem}.mat")
    assert np.array_equal(data.train.frames[0], frames_of(content, "a.mat", (180, 240), flip_y=True))


@pytest.mark.parametrize("compressed", [True, False])
def test_mat_files_are_read(compressed, tmp_path):
    columns = {
        "ts": np.array([1, 5, 9], "<f8"),
        "x": np.array([0, 239, 7], "<u2"),
        "y": np.array([179, 0, 7], "<u2"),
        "pol": np.array([1, 0, 1], "u1"),
    }
    content = archives.encode_mat(columns | {"note": np.array([1.5], "<f8")}, compressed)
    events = read_events(NamedBytes(content, "a.mat"), (180, 240))
    assert events.tolist() == [(1, 0, 179, 1), (5, 239, 0, 0), (9, 7, 7, 1)]
    with pytest.raises(ValueError, match="holds ts, x, y, expected arrays ts, x, y and pol"):
        read_events(NamedBytes(archives.encode_mat({k: v for k, v in columns.items() if k != "pol"}), "a.mat"))
    with pytest.raises(ValueError, match="its arrays ts, x, y, pol differ in length"):
        read_events(NamedBytes(archives.encode_mat(columns | {"x": columns["x"][:2]}), "a.mat"))
    bomb = archives.encode_mat({"ts": np.zeros(1 << 24, "<f8")})
    with pytest.raises(ValueError, match="inflates to more than 8,388,608 bytes; it is damaged"):
        read_events(NamedBytes(bomb, "a.mat"))


def test_own_recordings_may_be_mat_files(tmp_path):
    events = archives.random_events(np.random.default_rng(0), 240, 180)
    columns = {name: events[key].astype("<i4") for name, key in (("ts", "t"), ("x", "x"), ("y", "y"), ("pol", "p"))}
    for folder in ("train/clap", "train/wave", "test/clap", "test/wave"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "0.mat").write_bytes(archives.encode_mat(columns))
    cfg = DataConfig(
        name="recordings", root=str(tmp_path), timesteps=3, frame_size=12, slicing="time", sensor="240x180"
    )
    data = load(tmp_path, tmp_path, cfg)
    assert data.train.names.tolist() == ["train/clap/0.mat", "train/wave/0.mat"]
    assert np.array_equal(data.train.frames[0], frames_of(archives.encode_mat(columns), "a.mat", (180, 240)))


def test_mat_files_written_by_scipy_are_read(tmp_path):
    scipy_io = pytest.importorskip("scipy.io", reason="SciPy, which writes MATLAB's files, is not installed")
    events = archives.random_events(np.random.default_rng(0), 240, 180)
    for compress in (False, True):
        scipy_io.savemat(
            tmp_path / "a.mat", {"ts": events["t"], "x": events["x"], "y": events["y"], "pol": events["p"]},
            do_compression=compress,
        )  # fmt: skip
        found = read_events(tmp_path / "a.mat", (180, 240))
        assert all(np.array_equal(found[name], events[name]) for name in "txyp")


def test_gestures_of_spikingjelly(made, tmp_path):
    data = load(tmp_path, made / "gesture-spikingjelly", small("dvs-gesture"))
    assert (len(data.train), len(data.test)) == (24, 12)
    assert data.train.labels.tolist().count(7) == 4
    path = made / "gesture-spikingjelly/events_np/test/3/user24_led_0.npz"
    row = data.test.names.tolist().index("test/3/user24_led_0.npz")
    assert data.test.labels[row] == 3
    assert np.array_equal(data.test.frames[row], frames_of(path.read_bytes(), "a.npz", (128, 128)))


def test_gestures_of_tonic_have_times_in_milliseconds(made, tmp_path):
    cfg = small("dvs-gesture")
    data = load(tmp_path, made / "gesture-tonic", cfg)
    assert (len(data.train), len(data.test)) == (22, 11)
    assert sorted(data.test.labels.tolist()) == list(range(11))
    row = data.test.labels.tolist().index(10)
    table = np.load(made / "gesture-tonic/ibmGestureTest/user24_led/10.npy")
    events = np.zeros(len(table), [("t", "i8"), ("x", "i2"), ("y", "i2"), ("p", "i1")])
    for column, name in enumerate("xyp"):
        events[name] = table[:, column]
    events["t"] = table[:, 3] * 1000
    content = io.BytesIO()
    np.save(content, events)
    assert np.array_equal(data.test.frames[row], frames_of(content.getvalue(), "a.npy", (128, 128)))
    duration = replace(cfg, slicing="duration", duration_us=100_000)
    assert load(tmp_path, made / "gesture-tonic", duration).test.frames[row].sum() < len(events)


def test_cifar10_dvs_of_spikingjelly_gives_the_frames_of_the_originals(tmp_path):
    """Its files hold x = 127 − row, y = column and the other polarity of each event."""
    rng = np.random.default_rng(0)
    for kind in CIFAR10_NAMES:
        (tmp_path / "original" / kind).mkdir(parents=True)
        (tmp_path / "cached/events_np" / kind).mkdir(parents=True)
        for number in range(10):
            path = tmp_path / "original" / kind / f"cifar10_{kind}_{number}.aedat"
            path.write_bytes(aedat2(rng))
            events = read_events(path)
            raw_x, raw_y = 127 - events["x"], events["y"]  # the fields of the address, as that library decodes them
            turned = {"t": events["t"], "x": 127 - raw_y, "y": 127 - raw_x, "p": 1 - events["p"]}
            np.savez(tmp_path / "cached/events_np" / kind / f"{path.stem}.npz", **turned)
    cfg = small("cifar10-dvs")
    ours = load(tmp_path / "a", tmp_path / "original", cfg)
    theirs = load(tmp_path / "b", tmp_path / "cached", cfg)
    assert ours.train.names.tolist() == theirs.train.names.tolist()
    assert np.array_equal(ours.train.frames, theirs.train.frames)
    assert np.array_equal(ours.test.frames, theirs.test.frames)


def test_converted_cifar10_dvs_is_not_turned(tmp_path):
    """A file that states its sensor was not written by SpikingJelly."""
    rng = np.random.default_rng(0)
    for kind in CIFAR10_NAMES:
        (tmp_path / "original" / kind).mkdir(parents=True)
        (tmp_path / "converted" / kind).mkdir(parents=True)
        for number in range(10):
            path = tmp_path / "original" / kind / f"cifar10_{kind}_{number}.aedat"
            path.write_bytes(aedat2(rng))
            out = tmp_path / "converted" / kind / f"{path.stem}.npz"
            events = read_events(path)
            np.savez(out, height=128, width=128, **{name: events[name] for name in "txyp"})
    cfg = small("cifar10-dvs")
    ours = load(tmp_path / "a", tmp_path / "original", cfg)
    assert np.array_equal(load(tmp_path / "b", tmp_path / "converted", cfg).train.frames, ours.train.frames)


def test_aedat4_copies_of_gesture_and_cifar10_dvs(tmp_path):
    faery = pytest.importorskip("faery", reason="the extra `cameras` is not installed")

    def write(path: Path, events: np.ndarray) -> None:
        converted = np.zeros(len(events), faery.EVENTS_DTYPE)
        for ours, theirs in (("t", "t"), ("x", "x"), ("y", "y"), ("p", "on")):
            converted[theirs] = events[ours]
        faery.events_stream_from_array(converted, dimensions=(128, 128)).to_file(path)

    rng = np.random.default_rng(0)
    for kind in CIFAR10_NAMES:
        for folder in ("original", "copy"):
            (tmp_path / folder / kind).mkdir(parents=True)
        for number in range(10):
            path = tmp_path / "original" / kind / f"cifar10_{kind}_{number}.aedat"
            path.write_bytes(aedat2(rng))
            write(tmp_path / "copy" / kind / f"{path.stem}.aedat4", read_events(path))
    cfg = small("cifar10-dvs")
    ours, theirs = (load(tmp_path / f"{name}-root", tmp_path / name, cfg) for name in ("original", "copy"))
    assert np.array_equal(ours.train.frames, theirs.train.frames)
    archive = gesture_archive(tmp_path / "gesture", [(1, "lab"), (24, "led")])
    shutil.unpack_archive(archive, tmp_path / "unpacked")
    (tmp_path / "again").mkdir()
    for path in sorted((tmp_path / "unpacked/DvsGesture").iterdir()):
        if path.suffix == ".aedat":
            events = read_events(path)
            write(tmp_path / "again" / f"{path.stem}.aedat4", events)
            with open_recording(tmp_path / "again" / f"{path.stem}.aedat4") as recording:
                shift = int(events["t"][0]) - int(next(recording.packed()).t[0])
        else:
            rows = path.read_text().splitlines()
            shutil.copy(path, tmp_path / "again" / path.name)
            if path.name.endswith("_labels.csv") and rows:
                moved = [
                    ",".join([k, *(str(int(v) - shift) for v in rest)]) for k, *rest in (r.split(",") for r in rows[1:])
                ]
                (tmp_path / "again" / path.name).write_text("\n".join([rows[0], *moved]) + "\n")
    cfg = small("dvs-gesture")
    ours = load(tmp_path / "c", archive, cfg)
    theirs = load(tmp_path / "d", tmp_path / "again", cfg)
    assert np.array_equal(ours.test.frames, theirs.test.frames)


@pytest.mark.parametrize("name", ["ncaltech101", "dvs-lip", "asl-dvs"])
def test_recipes_run_and_say_how_to_get_the_data(name, made, tmp_path, capsys):
    assert main(["data", "prepare", name, "--root", str(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert "no recordings of" in err
    assert "https://" in err
    cfg = RECIPES[name].config
    frames = ["--timesteps", "3", "--frame-size", "12"]
    assert main(["data", "prepare", name, "--root", str(tmp_path), "--source", str(made / name), *frames]) == 0
    assert f"{name}: " in capsys.readouterr().out
    overrides = ["--data.root", str(tmp_path), "--data.timesteps", "3", "--data.frame-size", "12", "--data.limit", "16"]
    small_run = ["--model.width", "2", "--optim.epochs", "1", "--optim.batch-size", "8"]
    assert main(["train", name, *overrides, *small_run, "--out", str(tmp_path / "run")]) == 0
    assert cfg.model.num_classes == len(datasets.DATASETS[name].classes)
