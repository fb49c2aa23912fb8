"""Preparation of event data sets: from archives to caches of frames, with damaged archives and damaged caches."""

import errno
import gzip
import json
import os
import random
import re
import signal
import subprocess
import sys
import tarfile
import time
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from makers import RECORDINGS, cifar10_dvs, gesture, gesture_archive, nmnist_zip

from multifire import datasets
from multifire.config import DataConfig, get_recipe
from multifire.datasets import prepare as preparing
from multifire.datasets.cache import cache_folder, command
from multifire.datasets.prepare import prepare
from multifire.events import to_frames

SHARED = Path(__file__).parents[3] / "shared" / "data"
GESTURE = get_recipe("dvs-gesture").data
SMALL = replace(GESTURE, timesteps=4, frame_size=8, duration_us=300_000)
NMNIST = replace(get_recipe("nmnist").data, timesteps=3, frame_size=17, slicing="time")


def files_of(folder: Path) -> dict[str, bytes]:
    """Return the contents of a cache's files, by name."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def archive(tmp_path_factory) -> Path:
    return gesture_archive(tmp_path_factory.mktemp("source"))


@pytest.fixture(scope="module")
def reference(archive, tmp_path_factory) -> dict[str, bytes]:
    """Return the files that an uninterrupted preparation makes."""
    return files_of(prepare(SMALL, tmp_path_factory.mktemp("reference"), archive, workers=1))


# The prepared frames


def test_gestures_are_cut_out_by_label_and_split_by_user(archive, tmp_path):
    prepare(SMALL, tmp_path, archive, workers=1)
    data = datasets.load("dvs-gesture", tmp_path, SMALL)
    assert (len(data.train), len(data.test)) == (36, 24)
    assert data.train.frames.shape == (36, 4, 2, 8, 8)
    assert isinstance(data.train.frames, np.memmap)
    assert data.train.labels.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 7, 8, 9, 10] * 3
    assert data.train.names[:2].tolist() == ["user01_lab/00", "user01_lab/01"]
    assert {name.partition("/")[0] for name in data.test.names.tolist()} == {"user24_led", "user29_natural"}


def test_frames_of_a_gesture_contain_only_its_own_events(archive, tmp_path):
    """The expected frames are decoded by hand from the gesture's own packets in the recording that the tool made."""
    prepare(SMALL, tmp_path, archive, workers=1)
    frames = datasets.load("dvs-gesture", tmp_path, SMALL).train.frames[2]
    content, labels = gesture.make_recording(1, "lab")
    _, start, end = map(int, labels.decode().split("\n")[3].split(","))
    packet = 28 + 8 + 28 + 8 * gesture.EVENTS
    body = content[content.index(b"#!END-HEADER\r\n") + len(b"#!END-HEADER\r\n") :][2 * packet : 3 * packet]
    data, t = np.frombuffer(body[28 + 8 + 28 :], "<u4").reshape(-1, 2).astype(np.int64).T
    assert (t >= start).all()
    assert (t < end).all()
    data, t = data[data & 1 == 1], t[data & 1 == 1]
    expected = np.zeros((4, 2, 8, 8), int)
    for d, when in zip(data.tolist(), t.tolist(), strict=True):
        if (when - t[0]) // 300_000 < 4:
            expected[(when - t[0]) // 300_000, d >> 1 & 1, (d >> 2 & 0x1FFF) // 16, (d >> 17 & 0x1FFF) // 16] += 1
    assert np.array_equal(frames, expected)


def test_archive_and_unpacked_archive_give_the_same_frames(archive, reference, tmp_path):
    with tarfile.open(archive) as file:
        file.extractall(tmp_path / "unpacked", filter="data")
    folder = prepare(SMALL, tmp_path, tmp_path / "unpacked", workers=1)
    for name in ("train.npy", "test.npy"):
        assert (folder / name).read_bytes() == reference[name]


def test_number_of_workers_does_not_change_the_cache(archive, reference, tmp_path):
    reports = []
    folder = prepare(SMALL, tmp_path, archive, workers=2, on_progress=lambda *report: reports.append(report))
    assert files_of(folder) == reference
    assert reports[0] == (0, 122)
    assert [done for done, _ in reports] == [0, 1, 2, 3, 4, 5]


def test_sources_are_found_in_the_root(tmp_path, reference):
    gesture_archive(tmp_path / "dvs-gesture")
    assert files_of(prepare(SMALL, tmp_path, workers=1)) == reference


def test_labels_may_come_before_or_after_all_recordings(reference, tmp_path):
    def write(order):
        with tarfile.open(tmp_path / "DvsGesture.tar.gz", "w:gz") as tar:
            for user, light, index in order:
                name = f"DvsGesture/user{user:02}_{light}{('.aedat', '_labels.csv')[index]}"
                gesture.add(tar, name, gesture.make_recording(user, light)[index])

    for number, kinds in enumerate(((1, 0), (0, 1))):
        write([(user, light, kind) for kind in kinds for user, light in reversed(RECORDINGS)])
        folder = prepare(SMALL, tmp_path / str(number), tmp_path / "DvsGesture.tar.gz", workers=1)
        assert all((folder / name).read_bytes() == reference[name] for name in ("train.npy", "test.npy"))


def test_nmnist_from_one_zip_two_zips_and_folders_is_the_same(tmp_path):
    one = nmnist_zip(tmp_path / "one" / "both.zip")
    with zipfile.ZipFile(one) as file:
        file.extractall(tmp_path / "unpacked")
        (tmp_path / "two").mkdir()
        for split in ("Train", "Test"):
            with zipfile.ZipFile(tmp_path / "two" / f"{split}.zip", "w") as part:
                for name in file.namelist():
                    if name.startswith(split):
                        part.writestr(name, file.read(name))
    caches = [
        prepare(NMNIST, tmp_path / f"root{number}", source, workers=1)
        for number, source in enumerate((one, one.parent, tmp_path / "two", tmp_path / "unpacked"))
    ]
    for name in ("train.npy", "test.npy"):
        assert len({(folder / name).read_bytes() for folder in caches}) == 1
    data = datasets.load("nmnist", tmp_path / "root0", NMNIST)
    assert (len(data.train), len(data.test)) == (12, 4)
    assert data.train.labels.tolist() == [int(name.split("/")[1]) for name in data.train.names.tolist()]
    assert data.train.frames.sum() == 12 * 40


def test_cifar10_dvs_trains_on_the_first_nine_tenths_by_number(tmp_path):
    cfg = replace(get_recipe("cifar10-dvs").data, timesteps=2)
    source = cifar10_dvs(tmp_path / "cifar10-dvs")
    prepare(cfg, tmp_path, workers=1)
    data = datasets.load("cifar10-dvs", tmp_path, cfg)
    assert (len(data.train), len(data.test)) == (90, 10)
    assert data.test.names.tolist() == [f"{kind}/14" for kind in datasets.registry.CIFAR10_NAMES]
    assert data.train.names[:9].tolist() == [f"airplane/{number}" for number in range(5, 14)]
    with zipfile.ZipFile(source / "bird.zip") as file:
        content = file.read("bird/cifar10_bird_14.aedat")
    address, t = np.frombuffer(content[content.index(b"test\r\n") + 6 :], ">u4").reshape(-1, 2).astype(np.int64).T
    events = np.zeros(len(t), dtype=[("t", "<i8"), ("x", "<i2"), ("y", "<i2"), ("p", "i1")])
    events["t"], events["x"], events["y"], events["p"] = t, 127 - (address >> 1 & 127), address >> 8 & 127, address & 1
    expected = to_frames(events, size=(42, 42), duration_us=10_000, timesteps=2, factor=3.04)
    assert np.array_equal(data.test.frames[2], expected)


def test_cifar10_dvs_split_by_seed_is_repeatable_and_balanced(tmp_path):
    cifar10_dvs(tmp_path / "cifar10-dvs")
    usual = replace(get_recipe("cifar10-dvs").data, timesteps=2)
    tests = []
    for seed in (None, 0, 0, 1):
        cfg = replace(usual, split_seed=seed)
        prepare(cfg, tmp_path, workers=1)
        data = datasets.load("cifar10-dvs", tmp_path, cfg)
        assert np.bincount(data.test.labels).tolist() == [1] * 10
        assert not set(data.test.names.tolist()) & set(data.train.names.tolist())
        tests.append(data.test.names.tolist())
    assert tests[1] == tests[2]
    assert len({tuple(names) for names in tests}) == 3


@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared N-MNIST recordings are not here")
def test_real_nmnist_is_prepared(tmp_path):
    prepare(NMNIST, tmp_path, SHARED / "nmnist-1100.zip")
    data = datasets.load("nmnist", tmp_path, NMNIST)
    assert (len(data.train), len(data.test)) == (1000, 100)
    assert np.bincount(data.test.labels).tolist() == [8, 14, 8, 11, 14, 7, 10, 15, 2, 11]
    with zipfile.ZipFile(SHARED / "nmnist-1100.zip") as file:
        size = sum(info.file_size for info in file.infolist() if info.filename.startswith("Train/"))
    assert 0.99 * size / 5 < int(data.train.frames.sum(dtype=np.int64)) <= size / 5


# Options and sources


def test_other_options_make_another_cache(archive, tmp_path):
    changes = [{}, {"timesteps": 5}, {"frame_size": 9}, {"duration_us": 1000}, {"binary": True}, {"slicing": "time"},
               {"slicing": "count"}]  # fmt: skip
    folders = [prepare(replace(SMALL, **change), tmp_path, archive, workers=1) for change in changes]
    assert len(set(folders)) == len(changes)
    contents = {(folder / "train.npy").read_bytes() for folder in folders}
    assert len(contents) == len(changes)
    data = datasets.load("dvs-gesture", tmp_path, replace(SMALL, binary=True))
    assert data.train.frames.max() == 1


def test_options_without_effect_on_the_frames_share_a_cache(archive, tmp_path):
    first = cache_folder(replace(SMALL, slicing="time"), tmp_path)
    assert cache_folder(replace(SMALL, slicing="time", duration_us=7, flip=True, roll=3), tmp_path) == first


def test_second_preparation_leaves_the_cache_unchanged(archive, tmp_path):
    folder = prepare(SMALL, tmp_path, archive, workers=1)
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    prepare(SMALL, tmp_path, archive, workers=1)
    prepare(SMALL, tmp_path, workers=1)  # a finished cache needs no source
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before


def test_cache_of_another_source_is_refused(archive, tmp_path):
    other = gesture_archive(tmp_path / "other", RECORDINGS[1:])
    folder = prepare(SMALL, tmp_path, archive, workers=1)
    before = files_of(folder)
    with pytest.raises(ValueError, match=r"was made from another source \(DvsGesture\.tar\.gz\).*--rebuild"):
        prepare(SMALL, tmp_path, other, workers=1)
    assert files_of(folder) == before
    prepare(SMALL, tmp_path, other, workers=1, rebuild=True)
    assert len(datasets.load("dvs-gesture", tmp_path, SMALL).train) == 24


def test_error_for_missing_sources_says_how_to_get_them(tmp_path):
    expected = {
        "dvs-gesture": r"expected DvsGesture\.tar\.gz.*research\.ibm\.com.*or give its location with --source",
        "cifar10-dvs": r"airplane\.zip.*`multifire data download cifar10-dvs` gets it",
        "nmnist": r"Train\.zip and Test\.zip.*data\.mendeley\.com",
    }
    for name, message in expected.items():
        (tmp_path / name).mkdir()
        with pytest.raises(FileNotFoundError, match=f"no recordings of {name}.*{message}"):
            prepare(get_recipe(name).data, tmp_path, workers=1)
    with pytest.raises(FileNotFoundError, match="nowhere: no such file or folder"):
        prepare(GESTURE, tmp_path, tmp_path / "nowhere")


def test_error_for_a_missing_preparation_names_the_command(tmp_path):
    cfg = replace(GESTURE, timesteps=10, slicing="count", binary=True)
    with pytest.raises(
        FileNotFoundError,
        match=rf"not prepared; run `multifire data prepare dvs-gesture --root {tmp_path} --timesteps 10 "
        "--slicing count --binary`",
    ):
        datasets.load("dvs-gesture", tmp_path, cfg)


def test_the_command_undoes_what_the_recipe_does(tmp_path):
    cfg = replace(get_recipe("asl-dvs").data, flip_y=False, hot_pixels="drop")
    assert command(cfg, tmp_path) == f"multifire data prepare asl-dvs --root {tmp_path} --hot-pixels drop --no-flip-y"


def test_preparation_of_images_is_refused(tmp_path):
    with pytest.raises(ValueError, match="digits holds images, which need no preparation"):
        prepare(DataConfig(name="digits"), tmp_path)


# Interruptions, a full disk, and simultaneous preparations


@pytest.mark.parametrize("stop_at", [0, 1, 3, 5])
def test_interrupted_preparation_keeps_the_finished_recordings(archive, reference, tmp_path, monkeypatch, stop_at):
    def stop(done, total):
        if done == stop_at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(SMALL, tmp_path, archive, workers=1, on_progress=stop)
    with pytest.raises(FileNotFoundError, match="not prepared"):
        datasets.load("dvs-gesture", tmp_path, SMALL)
    keys = []
    make_part = preparing.make_part
    monkeypatch.setattr(preparing, "make_part", lambda job, cfg: keys.append(job.key) or make_part(job, cfg))
    assert files_of(prepare(SMALL, tmp_path, archive, workers=1)) == reference
    assert len(keys) == len(RECORDINGS) - stop_at


def test_full_disk_keeps_the_finished_recordings(archive, reference, tmp_path, monkeypatch):
    write, remaining = preparing.write_atomic, iter(range(2))

    def write_until_full(path, content):
        if next(remaining, None) is None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(path, content)

    monkeypatch.setattr(preparing, "write_atomic", write_until_full)
    with pytest.raises(OSError, match="No space left on device; finished recordings are kept: make room, and the same"):
        prepare(SMALL, tmp_path, archive, workers=1)
    monkeypatch.undo()
    assert len(list(cache_folder(SMALL, tmp_path).glob("parts-*/*.npz"))) == 2
    assert files_of(prepare(SMALL, tmp_path, archive, workers=1)) == reference


def test_damaged_part_is_detected(archive, tmp_path):
    def stop(done, total):
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(SMALL, tmp_path, archive, workers=1, on_progress=stop)
    part = next(cache_folder(SMALL, tmp_path).glob("parts-*/*.npz"))
    part.write_bytes(part.read_bytes()[:-100])
    with pytest.raises(ValueError, match=rf"{part.name}: damaged .* delete it"):
        prepare(SMALL, tmp_path, archive, workers=1)


def start_preparation(root: Path, source: Path) -> subprocess.Popen:
    words = ["--timesteps", "4", "--frame-size", "8", "--duration-us", "300000", "--workers", "2"]
    command = [sys.executable, "-m", "multifire", "data", "prepare", "dvs-gesture", "--root", root, "--source", source]
    return subprocess.Popen([*command, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_two_simultaneous_preparations_give_the_same_cache(archive, reference, tmp_path):
    both = [start_preparation(tmp_path, archive) for _ in range(2)]
    for process in both:
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        assert "36 training and 24 test samples" in out
    folder = cache_folder(SMALL, tmp_path)
    assert {name: content for name, content in files_of(folder).items() if name in reference} == reference


@pytest.mark.slow
def test_ten_random_kills_do_not_change_the_cache(tmp_path):
    """Prepare a synthetic DVS128 Gesture of full size; kill the process ten times, the last while parts are joined."""
    archive, root = gesture_archive(tmp_path / "source", gesture.recordings()), tmp_path / "killed"
    undisturbed = files_of(prepare(SMALL, tmp_path / "undisturbed", archive, workers=2))
    rng = random.Random(0)
    stages, killed = [*sorted(rng.sample(range(1, 120), 9)), 122], []
    for stage in stages:
        process = start_preparation(root, archive)
        while process.poll() is None and (done := count_parts(root)) < stage:
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.03))
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=30)
        killed.append((process.returncode, done))
    assert [code for code, _ in killed] == [-signal.SIGKILL] * 10, killed
    final = prepare(SMALL, root, archive, workers=2)
    assert files_of(final) == undisturbed
    data = datasets.load("dvs-gesture", root, SMALL)
    assert (len(data.train), len(data.test)) == (1176, 288)


def count_parts(root: Path) -> int:
    return len(list(cache_folder(SMALL, root).glob("parts-*/*.npz")))


def test_workers_end_when_their_parent_is_killed(tmp_path):
    archive = gesture_archive(tmp_path / "source", gesture.recordings()[:60])
    process = start_preparation(tmp_path, archive)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    if not children.exists():
        process.kill()
        pytest.skip("this system does not list a process's children")
    deadline = time.monotonic() + 60
    while len(pids := children.read_text().split()) < 3 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=10)
    while any(Path(f"/proc/{pid}").exists() for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not [pid for pid in pids if Path(f"/proc/{pid}").exists()]


# Damaged caches


def prepare_cache(archive: Path, root: Path) -> Path:
    return prepare(SMALL, root, archive, workers=1)


def flip_bit(folder: Path) -> None:
    content = bytearray((folder / "test.npy").read_bytes())
    content[-40] ^= 1
    (folder / "test.npy").write_bytes(content)


def edit(**changes):
    def change(folder: Path) -> None:
        path = folder / "cache.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (flip_bit, r"test\.npy: damaged: its sha256 is .*, expected"),
        (lambda folder: (folder / "train.npy").unlink(), r"train\.npy: missing or damaged"),
        (lambda folder: (folder / "train.npy").write_bytes(b""), r"train\.npy: missing or damaged"),
        (lambda folder: os.truncate(folder / "train.npy", 1000), r"train\.npy: missing or damaged"),
        (lambda folder: np.save(folder / "train.npy", np.zeros((36, 4, 2, 8, 8))), r"train\.npy: is float64"),
        (lambda folder: np.save(folder / "train.npy", np.zeros(3, np.uint8)), r"is uint8 \[3\], expected uint8 \[36, "),
        (edit(version=0), r"cache\.json: a cache of version 0, expected version 1"),
        (edit(source="x"), r"cache\.json: damaged: its content does not match its digest"),
        (lambda folder: (folder / "cache.json").write_text("{"), r"cache\.json: damaged, or not a cache's record"),
        (lambda folder: (folder / "cache.json").write_text("[]"), r"cache\.json: damaged, or not a cache's record"),
    ],
)  # fmt: skip
def test_damaged_cache_is_refused_and_rebuilt_on_request(archive, reference, tmp_path, damage, message):
    damage(prepare_cache(archive, tmp_path))
    with pytest.raises(ValueError, match=message + r".*; run `multifire data prepare dvs-gesture .* --rebuild`"):
        datasets.load("dvs-gesture", tmp_path, SMALL)
    assert files_of(prepare(SMALL, tmp_path, archive, workers=1, rebuild=True)) == reference


def test_cache_under_the_name_of_another_is_refused(archive, tmp_path):
    other = replace(SMALL, duration_us=1000)
    prepare_cache(archive, tmp_path).rename(cache_folder(other, tmp_path))
    with pytest.raises(ValueError, match=r"made with .*'duration_us': 300000.*, expected .*'duration_us': 1000"):
        datasets.load("dvs-gesture", tmp_path, other)


def test_no_pickle_is_loaded_from_a_cache(archive, tmp_path):
    folder = prepare_cache(archive, tmp_path)
    np.save(folder / "train.npy", np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match=r"train\.npy: missing or damaged"):
        datasets.load("dvs-gesture", tmp_path, SMALL)


# Label files

HEADER = "class,startTime_usec,endTime_usec\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "starts with '', expected 'class,startTime_usec,endTime_usec'"),
        ("1,2,3\n", "starts with '1,2,3', expected"),
        (HEADER, "holds no gesture, only a header"),
        (HEADER + "1,2\n", "line 2: is '1,2', expected three whole numbers"),
        (HEADER + "1,100,200\nx,300,400\n", "line 3: is 'x,300,400', expected three whole numbers"),
        (HEADER + "1,-5,200\n", "line 2: is '1,-5,200'"),
        (HEADER + "0,100,200\n", "line 2: class 0, expected 1 to 11"),
        (HEADER + "12,100,200\n", "line 2: class 12, expected 1 to 11"),
        (HEADER + "1,200,200\n", "line 2: ends at 200 µs, which is not after its start at 200 µs"),
        (
            HEADER + "1,900000000,900500000\n",
            "holds no event from 900,000,000 to 900,500,000 µs: its label lies beyond",
        ),
        (HEADER + "1,1,50\n", "holds no event from 1 to 50 µs"),
        ("class;start;end\n", "starts with 'class;start;end', expected"),
        ("x" * (2 << 20), "has more than 1,048,576 bytes"),
    ],
)
def test_invalid_label_files_are_refused(tmp_path, content, message):
    source = tmp_path / "source"
    source.mkdir()
    (source / "user01_lab.aedat").write_bytes(gesture.make_recording(1, "lab")[0])
    (source / "user01_lab_labels.csv").write_text(content)
    with pytest.raises(ValueError, match=rf"user01_lab.*{message}"):
        prepare(SMALL, tmp_path, source, workers=1)


def test_missing_label_file_is_named_and_other_recordings_are_kept(tmp_path):
    with tarfile.open(tmp_path / "DvsGesture.tar.gz", "w:gz") as tar:
        for user, light in RECORDINGS:
            recording, labels = gesture.make_recording(user, light)
            gesture.add(tar, f"DvsGesture/user{user:02}_{light}.aedat", recording)
            if user != 2:
                gesture.add(tar, f"DvsGesture/user{user:02}_{light}_labels.csv", labels)
    with pytest.raises(ValueError, match=r"1 recording has no label file \(user02_led_labels\.csv\); restore it"):
        prepare(SMALL, tmp_path, tmp_path / "DvsGesture.tar.gz", workers=1)
    assert len(list(cache_folder(SMALL, tmp_path).glob("parts-*/*.npz"))) == 4


def test_unknown_user_is_refused(tmp_path):
    (tmp_path / "source").mkdir()
    recording, labels = gesture.make_recording(1, "lab")
    (tmp_path / "source" / "user30_lab.aedat").write_bytes(recording)
    (tmp_path / "source" / "user30_lab_labels.csv").write_bytes(labels)
    with pytest.raises(ValueError, match="user 30, expected 1 to 29"):
        prepare(SMALL, tmp_path, tmp_path / "source", workers=1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: rows[::-1], "gestures are not in the order of their start; sorted them"),
        (
            lambda rows: [rows[0], "2,1000000,3000000", *rows[2:]],
            r"gestures from \d+ and 1000000 µs on overlap; both keep their events",
        ),
        (lambda rows: [*rows[:-1], rows[-1].rpartition(",")[0] + ",99000000"], "its last event is at"),
    ],
)
def test_unusual_labels_cause_a_warning(archive, tmp_path, caplog, change, message):
    source = tmp_path / "source"
    with tarfile.open(archive) as file:
        file.extractall(source, filter="data")
    labels = source / "DvsGesture" / "user01_lab_labels.csv"
    header, *rows = labels.read_text().splitlines()
    labels.write_text("\n".join([header, *change(rows)]) + "\n")
    prepare(SMALL, tmp_path, source, workers=1)
    assert any(re.search(message, text) for text in caplog.messages)
    assert len(datasets.load("dvs-gesture", tmp_path, SMALL).train) == 36


def test_order_of_the_labels_does_not_change_the_samples(archive, reference, tmp_path):
    source = tmp_path / "source"
    with tarfile.open(archive) as file:
        file.extractall(source, filter="data")
    for labels in source.rglob("*.csv"):
        header, *rows = labels.read_text().splitlines()
        labels.write_text("\r\n".join([header, *rows[::-1], ""]))
    assert (prepare(SMALL, tmp_path, source, workers=1) / "train.npy").read_bytes() == reference["train.npy"]


# Damaged and malicious archives


def tar_with(path: Path, name: str, content: bytes = b"x") -> Path:
    with tarfile.open(path, "w:gz") as tar:
        gesture.add(tar, name, content)
    return path


@pytest.mark.parametrize("name", ["../user01_lab.aedat", "/etc/user01_lab.aedat", "a/../../user01_lab.aedat"])
def test_archive_with_paths_outside_its_folder_is_refused(tmp_path, name):
    bad = tar_with(tmp_path / "bad.tar.gz", name)
    with pytest.raises(ValueError, match="would leave its folder"):
        prepare(SMALL, tmp_path / "root", bad, workers=1)
    with zipfile.ZipFile(tmp_path / "bad.zip", "w") as file:
        file.writestr(name, b"x")
    with pytest.raises(ValueError, match="would leave its folder"):
        prepare(NMNIST, tmp_path / "root", tmp_path / "bad.zip", workers=1)
    assert not list(tmp_path.rglob("*.aedat"))


def test_zip_bomb_is_not_decompressed(tmp_path):
    with zipfile.ZipFile(tmp_path / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("Train/0/00001.bin", bytes(20 << 20))
    with pytest.raises(ValueError, match=r"claims 20,971,520 bytes, expected at most 16,777,216"):
        prepare(NMNIST, tmp_path, tmp_path / "bomb.zip", workers=1)


def test_overlapping_members_are_refused(tmp_path):
    """Two hundred members share the compressed bytes of one member."""
    path = nmnist_zip(tmp_path / "n.zip", 1, 1)
    with zipfile.ZipFile(path, "a") as file:
        first = file.filelist[0]
        for number in range(200):
            twin = zipfile.ZipInfo(f"Train/1/{number:05}.bin")
            for name in ("header_offset", "compress_size", "file_size", "CRC", "compress_type"):
                setattr(twin, name, getattr(first, name))
            file.filelist.append(twin)
        file._didModify = True
    with pytest.raises(ValueError, match="its members overlap"):
        prepare(NMNIST, tmp_path, path, workers=1)


@pytest.mark.parametrize("kind", ["lzma", "encrypted"])
def test_member_that_is_encrypted_or_has_a_rare_compression_is_refused(tmp_path, kind):
    path = tmp_path / "odd.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_LZMA if kind == "lzma" else zipfile.ZIP_DEFLATED) as file:
        file.writestr("Train/0/00001.bin", b"x" * 100)
    if kind == "encrypted":
        content = bytearray(path.read_bytes())
        for signature, flags in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):  # local header, entry of the directory
            content[content.index(signature) + flags] |= 1
        path.write_bytes(content)
        with zipfile.ZipFile(path) as file, pytest.raises(RuntimeError, match="encrypted"):
            file.read("Train/0/00001.bin")
    with pytest.raises(ValueError, match=r"odd\.zip: member 'Train/0/00001\.bin' is encrypted or packed in a rare way"):
        prepare(NMNIST, tmp_path, path, workers=1)


@pytest.mark.parametrize("keep", [0, 10, 300, 0.5, 0.99])
def test_truncated_zip_is_refused(tmp_path, keep):
    path = nmnist_zip(tmp_path / "n.zip")
    size = path.stat().st_size
    os.truncate(path, int(keep * size) if isinstance(keep, float) else keep)
    with pytest.raises(ValueError, match=r"n\.zip: damaged, or no zip archive"):
        prepare(NMNIST, tmp_path, path, workers=1)


def test_zip_with_a_damaged_member_is_refused(tmp_path):
    path = nmnist_zip(tmp_path / "n.zip")
    content = bytearray(path.read_bytes())
    content[100] ^= 255
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"n\.zip: damaged"):
        prepare(NMNIST, tmp_path, path, workers=1)


@pytest.mark.parametrize(
    ("share", "packed"), [(0.1, True), (0.5, True), (0.9, True), (0.999, True), (0.1, False), (0.5, False)]
)
def test_truncated_tar_is_refused(tmp_path, reference, archive, share, packed):
    """No cache is made of it, and what is kept of it does not change the cache of the whole archive."""
    cut, content = tmp_path / "DvsGesture.tar.gz", archive.read_bytes()
    content = content if packed else gzip.decompress(content)
    cut.write_bytes(content[: int(share * len(content))])
    with pytest.raises(ValueError, match=r"DvsGesture\.tar\.gz: (damaged|cut short)"):
        prepare(SMALL, tmp_path, cut, workers=1)
    with pytest.raises(FileNotFoundError, match="not prepared"):
        datasets.load("dvs-gesture", tmp_path, SMALL)
    assert files_of(prepare(SMALL, tmp_path, archive, workers=1)) == reference


def test_file_that_is_not_a_tar_archive_is_refused(tmp_path):
    path = tmp_path / "DvsGesture.tar.gz"
    for content, message in (
        (b"<html>log in</html>" * 100, "damaged, or no tar archive"),
        (gzip.compress(b"<html>log in</html>" * 100), "damaged, or no tar archive"),
        (gzip.compress(bytes(1024)), "holds no userNN_LIGHT"),
        (b"", "holds no userNN_LIGHT"),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            prepare(SMALL, tmp_path, path, workers=1)


def test_duplicate_recording_in_a_tar_is_refused(tmp_path):
    recording, _ = gesture.make_recording(1, "lab")
    with tarfile.open(tmp_path / "DvsGesture.tar.gz", "w:gz") as tar:
        for _ in range(2):
            gesture.add(tar, "DvsGesture/user01_lab.aedat", recording)
    with pytest.raises(ValueError, match=r"holds user01_lab\.aedat twice"):
        prepare(SMALL, tmp_path, tmp_path / "DvsGesture.tar.gz", workers=1)


def test_tar_member_that_is_too_large_is_refused(tmp_path):
    member = tarfile.TarInfo("DvsGesture/user01_lab.aedat")
    member.size = 7 << 30
    path = tmp_path / "DvsGesture.tar.gz"
    path.write_bytes(gzip.compress(member.tobuf(tarfile.USTAR_FORMAT)))
    with pytest.raises(ValueError, match="claims 7,516,192,768 bytes, expected at most 2,147,483,648"):
        prepare(SMALL, tmp_path, path, workers=1)


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("content", [b"", b"#!AER-DAT3.1\r\n#!END-HEADER\r\n", b"nonsense" * 100])
def test_error_names_the_invalid_recording(tmp_path, content, workers):
    source = tmp_path / "source"
    source.mkdir()
    (source / "user01_lab.aedat").write_bytes(content)
    (source / "user01_lab_labels.csv").write_bytes(gesture.make_recording(1, "lab")[1])
    with pytest.raises(ValueError, match="user01_lab"):
        prepare(SMALL, tmp_path, source, workers=workers)


def test_source_without_test_recordings_is_refused(tmp_path):
    archive = gesture_archive(tmp_path / "source", RECORDINGS[:3])
    with pytest.raises(ValueError, match=r"makes 36 training and 0 test samples; needs both"):
        prepare(SMALL, tmp_path, archive, workers=1)
