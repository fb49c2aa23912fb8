"""Own data: folders of pictures, npz files, arrays, torch data sets, registered functions; and bad input, named."""

import os
import pickle
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from multifire import datasets
from multifire.config import DataConfig, RunConfig
from multifire.config.json_format import from_json, to_json
from multifire.datasets.loader import make_batches
from multifire.datasets.registry import REGISTERED

CPU = torch.device("cpu")
rng = np.random.default_rng(0)


@pytest.fixture(scope="module")
def digits() -> datasets.Dataset:
    return datasets.load("digits")


@pytest.fixture(scope="module")
def digits_folder(digits, tmp_path_factory) -> Path:
    """Every tenth embedded digit as train/CLASS/NUMBER.png and test/CLASS/NUMBER.png."""
    root = tmp_path_factory.mktemp("digits")
    for split in ("train", "test"):
        part = getattr(digits, split)
        for number in range(0, len(part), 10):
            folder = root / split / str(part.labels[number])
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(part.images[number, 0]).save(folder / f"{number}.png")
    return root


@pytest.fixture(autouse=True)
def no_registered_names() -> Iterator[None]:
    yield
    REGISTERED.clear()


def every_tenth(split: datasets.Split) -> datasets.Split:
    return split.pick(np.arange(0, len(split), 10))


def same(found: datasets.Split, expected: datasets.Split) -> None:
    assert np.array_equal(found.images, expected.images)
    assert np.array_equal(found.labels, expected.labels)


def batches_of(data: datasets.Dataset, info: datasets.DatasetInfo, cfg: DataConfig):
    return list(make_batches(data.train, info, cfg, batch_size=64, device=CPU, shuffle=True, seed=3).epoch(1))


def pictures(root: Path, names: dict[str, tuple[int, ...]]) -> Path:
    """Write random pictures of shapes (H, W) or (H, W, 3); the ending decides the format."""
    for name, shape in names.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)).save(path)
    return root


def two_classes(root: Path, shape: tuple[int, ...] = (8, 8, 3), count: int = 4, kind: str = "png") -> Path:
    names = {f"train/{c}/{i}.{kind}": shape for c in ("cat", "dog") for i in range(count)}
    return pictures(root, names | {f"test/{c}/0.{kind}": shape for c in ("cat", "dog")})


# Folders of pictures


def test_a_folder_of_digits_equals_the_built_in_reader(digits, digits_folder):
    cfg = DataConfig(name="folder", root=str(digits_folder), crop_padding=2, mean=(0.1307,), std=(0.3081,))
    data = datasets.load("folder", digits_folder, cfg)
    for found, expected in ((data.train, digits.train), (data.test, digits.test)):
        same(found, every_tenth(expected))
    assert data.info.classes == digits.info.classes
    expected = replace(digits, train=every_tenth(digits.train))
    for (x, y), (x2, y2) in zip(batches_of(data, data.info, cfg), batches_of(expected, digits.info, cfg), strict=True):
        assert torch.equal(x, x2)
        assert torch.equal(y, y2)


def test_classes_channels_sizes_mean_and_deviation_come_from_the_pictures(tmp_path):
    root = two_classes(tmp_path, (6, 9, 3), count=5)
    data = datasets.load("folder", root)
    assert data.info.classes == ("cat", "dog")
    assert (data.info.channels, data.info.height_width) == (3, (6, 9))
    pixels = data.train.images / 255
    assert data.info.mean == pytest.approx(pixels.mean((0, 2, 3)))
    assert data.info.std == pytest.approx(pixels.std((0, 2, 3)))
    assert data.info.published_sizes == (10, 2)
    first = np.asarray(Image.open(root / "train/cat/0.png"))
    assert np.array_equal(data.train.images[0], first.transpose(2, 0, 1))


@pytest.mark.parametrize("kind", ["png", "jpg", "jpeg", "webp", "PNG"])
def test_formats(tmp_path, kind):
    data = datasets.load("folder", two_classes(tmp_path, kind=kind))
    with Image.open(tmp_path / f"train/dog/1.{kind}") as picture:
        assert np.array_equal(data.train.images[3], np.asarray(picture).transpose(2, 0, 1))


def test_the_order_is_that_of_the_numbers_in_the_names(tmp_path):
    root = pictures(tmp_path, {f"train/{c}/{i}.png": (4, 4) for c in ("10", "9") for i in (2, 10, 1)})
    pictures(root, {f"test/{c}/1.png": (4, 4) for c in ("10", "9")})
    data = datasets.load("folder", root)
    assert data.info.classes == ("9", "10")
    expected = [np.asarray(Image.open(root / f"train/{c}/{i}.png")) for i in (1, 2, 10) for c in (9, 10)]
    assert np.array_equal(data.train.images[:, 0], expected)


def test_without_a_test_folder_a_share_is_held_out_by_seed(tmp_path):
    names = {f"{c}/{i}.png": (4, 4) for c, count in (("a", 10), ("b", 20), ("c", 2)) for i in range(count)}
    root = pictures(tmp_path, names)
    cfg = DataConfig(name="folder", root=str(root))
    data = datasets.load("folder", root, cfg)
    assert np.bincount(data.train.labels).tolist() == [8, 16, 1]
    assert np.bincount(data.test.labels).tolist() == [2, 4, 1]
    every = {image.tobytes() for part in (data.train, data.test) for image in part.images}
    assert len(every) == 32
    same(datasets.load("folder", root, replace(cfg, split_seed=0)).test, data.test)
    other = datasets.load("folder", root, replace(cfg, split_seed=1))
    assert not np.array_equal(other.test.images, data.test.images)
    half = datasets.load("folder", root, replace(cfg, test_share=0.5))
    assert np.bincount(half.test.labels).tolist() == [5, 10, 1]


def test_val_stands_for_test_and_deeper_folders_and_hidden_files_are_handled(tmp_path):
    root = pictures(tmp_path, {f"train/{c}/deep/{i}.png": (4, 4) for c in "ab" for i in range(2)})
    pictures(root, {f"val/{c}/{i}.png": (4, 4) for c in "ab" for i in range(3)})
    (root / "train/a/.hidden.png").write_bytes(b"no picture")
    (root / "train/a/notes.txt").write_text("no picture")
    data = datasets.load("folder", root)
    assert (len(data.train), len(data.test)) == (4, 6)


def test_size_and_channels_on_request(tmp_path):
    root = two_classes(tmp_path, (8, 8, 3))
    pictures(root, {"train/cat/odd.png": (10, 5), "train/cat/alpha.png": (8, 8, 4)})
    cfg = DataConfig(name="folder", size="6x4", channels=3)
    data = datasets.load("folder", root, cfg)
    assert data.train.images.shape == (10, 3, 6, 4)
    grey = datasets.load("folder", root, replace(cfg, channels=1))
    assert grey.train.images.shape == (10, 1, 6, 4)


def test_pictures_are_decoded_once(tmp_path, monkeypatch):
    from multifire.datasets import pictures as module

    root, calls = two_classes(tmp_path), []
    decode = module.decode
    monkeypatch.setattr(module, "decode", lambda *args: calls.append(args) or decode(*args))
    first = datasets.load("folder", root)
    count = len(calls)
    assert count >= 10
    again = datasets.load("folder", root)
    assert len(calls) == count
    same(again.train, first.train)
    assert again.info == first.info
    os.utime(root / "train/cat/0.png", ns=(1, 1))
    datasets.load("folder", root)
    assert len(calls) == 2 * count
    pictures(root, {"train/cat/more.png": (8, 8, 3)})
    assert len(datasets.load("folder", root).train) == 9


def test_a_damaged_cache_is_made_anew(tmp_path, caplog):
    root = two_classes(tmp_path)
    first = datasets.load("folder", root)
    before = first.train.images.copy()
    (file,) = root.glob(".multifire/pictures-*/train.npy")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert np.array_equal(datasets.load("folder", root).train.images, before)
    assert "damaged (its content does not match its checksum); the pictures are decoded again" in caplog.text
    (record,) = root.glob(".multifire/pictures-*/pictures.json")
    record.write_text("{}")
    assert np.array_equal(datasets.load("folder", root).train.images, before)


def test_a_killed_process_leaves_nothing_that_is_used(tmp_path):
    root = two_classes(tmp_path, count=3)
    program = (
        "import sys, time; from multifire import datasets; from multifire.datasets import pictures\n"
        "d = pictures.decode\n"
        "def slow(*a):\n    time.sleep(0.3); print('decoding', flush=True); return d(*a)\n"
        "pictures.decode = slow; datasets.load('folder', sys.argv[1])"
    )
    process = subprocess.Popen([sys.executable, "-c", program, str(root)], stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    time.sleep(0.4)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert not list(root.glob(".multifire/*/pictures.json"))
    data = datasets.load("folder", root)
    assert np.array_equal(data.train.images[0], np.asarray(Image.open(root / "train/cat/0.png")).transpose(2, 0, 1))
    pictures(root, {"train/cat/more.png": (8, 8, 3)})
    datasets.load("folder", root)
    assert not list(root.glob(".multifire/*/.*.tmp"))


def test_a_folder_that_cannot_be_written_is_read(tmp_path, monkeypatch, caplog):
    root = two_classes(tmp_path)
    monkeypatch.setattr(os, "access", lambda *args: False)
    data = datasets.load("folder", root)
    assert "cannot be written, so its pictures are decoded anew for each run" in caplog.text
    assert not (root / ".multifire").exists()
    monkeypatch.undo()
    same(datasets.load("folder", root).train, data.train)


BROKEN = [
    ({"train/cat/0.png": (8, 8)}, "holds one class, 'cat', expected at least two folders of pictures"),
    ({"train/cat/0.png": (8, 8), "train/dog/": ()}, "class 'dog' holds no pictures"),
    ({"train/cat/0.png": (8, 8), "train/dog/0.png": b""}, "train/dog/0.png: broken, or no PNG, JPEG or WebP picture"),
    ({"train/cat/0.png": b"GIF89a", "train/dog/0.png": (8, 8)}, "train/cat/0.png: broken, or no PNG"),
    (
        {"train/cat/0.png": (8, 8), "train/dog/0.png": (8, 9)},
        r"dog/0.png: is 8x9 pixels .*cat/0.png is 8x8.*--data.size",
    ),
    (
        {"train/cat/0.png": (8, 8), "train/dog/0.png": (8, 8, 3)},
        r"dog/0.png: is RGB, but .*cat/0.png is grey.*channels 3",
    ),
    (
        {"Train/cat/0.png": (8, 8), "Train/dog/0.png": (8, 8), "Test/cat/0.png": (8, 8)},
        "holds the folder Test, expected the folders train and test, or only folders of classes; rename it",
    ),
    (
        {"cat/0.png": (8, 8), "dog/0.png": (8, 8), "dog/1.png": (8, 8)},
        "class 'cat' has 1 sample, expected at least two",
    ),
]


@pytest.mark.parametrize(("files", "message"), BROKEN, ids=[message[:20] for _, message in BROKEN])
def test_bad_folders_are_named_in_one_line(tmp_path, files, message):
    for name, content in files.items():
        if content == ():
            (tmp_path / name).mkdir(parents=True)
        elif isinstance(content, bytes):
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_bytes(content)
        else:
            pictures(tmp_path, {name: content})
    if "train/cat/0.png" in files:
        pictures(tmp_path, {"test/cat/0.png": (8, 8)})
    before = sorted(path for path in tmp_path.rglob("*") if ".multifire" not in str(path))
    with pytest.raises(ValueError, match=message) as error:
        datasets.load("folder", tmp_path)
    assert "\n" not in str(error.value)
    assert sorted(path for path in tmp_path.rglob("*") if ".multifire" not in str(path)) == before


def test_a_truncated_picture_of_16_bits_and_a_huge_one_are_refused(tmp_path, monkeypatch):
    root = two_classes(tmp_path, (64, 64, 3))
    path = root / "train/dog/2.png"
    sound = path.read_bytes()
    path.write_bytes(sound[: len(sound) // 2])
    with pytest.raises(ValueError, match=r"train/dog/2.png: broken"):
        datasets.load("folder", root)
    Image.fromarray(rng.integers(0, 1 << 16, (64, 64), dtype=np.uint16)).save(path)
    with pytest.raises(ValueError, match=r"train/dog/2.png: has pixels of the kind 'I;16', expected 8 bits"):
        datasets.load("folder", root)
    path.write_bytes(sound)
    monkeypatch.setattr("multifire.datasets.pictures.MAX_PIXELS", 1000)
    with pytest.raises(ValueError, match=r"has 64 x 64 pixels, expected at most 1,000"):
        datasets.load("folder", root)


def test_missing_and_empty_folders_and_foreign_classes(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere: no such folder, expected a folder with train/CLASS"):
        datasets.load("folder", tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="holds no folder CLASS with pictures"):
        datasets.load("folder", tmp_path)
    root = two_classes(tmp_path / "a")
    pictures(root, {"test/bird/0.png": (8, 8, 3)})
    with pytest.raises(ValueError, match=r"test/bird: a class that .*train does not have"):
        datasets.load("folder", root)
    root = two_classes(tmp_path / "b")
    with pytest.raises(ValueError, match=r"holds no class 'fox' and a class 'dog', expected those of data.classes"):
        datasets.load("folder", root, DataConfig(name="folder", classes=("cat", "fox")))
    turned = datasets.load("folder", root, DataConfig(name="folder", classes=("dog", "cat")))
    assert turned.train.labels.tolist() == [0, 1] * 4


def test_a_full_disk_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr("multifire.datasets.pictures.shutil.disk_usage", lambda folder: type("Free", (), {"free": 10}))
    with pytest.raises(OSError, match=r"the decoded pictures need .* MB, 0.0 MB are free; make room"):
        datasets.load("folder", two_classes(tmp_path))


# npz


def test_an_npz_of_digits_equals_the_built_in_reader(digits, tmp_path):
    for name, images in (
        ("NCHW", lambda x: x),
        ("NHWC", lambda x: x.transpose(0, 2, 3, 1)),
        ("NHW", lambda x: x[:, 0]),
    ):
        path = tmp_path / f"{name}.npz"
        train, test = digits.train, digits.test
        np.savez(
            path, x_train=images(train.images), y_train=train.labels, x_test=images(test.images), y_test=test.labels
        )
        data = datasets.load("npz", path)
        same(data.train, train)
        same(data.test, test)
        assert data.info.classes == digits.info.classes
    cfg = DataConfig(name="npz", root=str(path), crop_padding=2, mean=(0.1307,), std=(0.3081,))
    data = datasets.load("npz", path, cfg)
    for (x, y), (x2, y2) in zip(batches_of(data, data.info, cfg), batches_of(digits, digits.info, cfg), strict=True):
        assert torch.equal(x, x2)
        assert torch.equal(y, y2)


def test_other_keys_a_folder_names_of_classes_and_a_split_by_seed(tmp_path):
    images, labels = rng.integers(0, 256, (20, 9, 9, 3), dtype=np.uint8), np.arange(20) % 2
    np.savez(tmp_path / "a.npz", images=images, labels=labels, classes=np.array(["cat", "dog"]))
    data = datasets.load("npz", tmp_path)
    assert data.info.classes == ("cat", "dog")
    assert data.train.images.shape == (16, 3, 9, 9)
    assert np.bincount(data.test.labels).tolist() == [2, 2]
    (tmp_path / "npz").mkdir()
    other = {
        "train_images": images,
        "train_labels": labels[:, None],
        "test_images": images,
        "test_labels": labels[:, None],
    }
    np.savez(tmp_path / "npz" / "medmnist.npz", **other)
    assert len(datasets.load("npz", tmp_path).train) == 20


def test_event_frames_from_an_npz(tmp_path):
    frames = rng.integers(0, 9, (6, 5, 2, 10, 12)).astype(np.float32)
    np.savez(tmp_path / "e.npz", x_train=frames, y_train=[0, 1, 2] * 2, x_test=frames[:3], y_test=[0, 1, 2])
    cfg = DataConfig(name="npz", root=str(tmp_path / "e.npz"), timesteps=5)
    data = datasets.load("npz", cfg.root, cfg)
    assert data.info.events
    assert (data.info.channels, data.info.height_width, data.info.timesteps) == (2, (10, 12), 5)
    assert np.array_equal(data.train.frames, frames)
    x, _ = next(iter(make_batches(data.train, data.info, cfg, batch_size=6, device=CPU, shuffle=False).epoch(0)))
    assert np.array_equal(x.numpy(), frames.transpose(1, 0, 2, 3, 4))
    full = datasets.complete(RunConfig(data=cfg), data)
    assert full.data.shape == (5, 2, 10, 12)
    assert datasets.describe(full.data).events
    with pytest.raises(
        ValueError, match=r"data.timesteps is 4, but each sample of npz has 5 frames; give --data.timesteps 5"
    ):
        datasets.complete(RunConfig(data=replace(cfg, timesteps=4)), data)
    with pytest.raises(ValueError, match=r"data.mean is given, but npz holds events"):
        datasets.load("npz", cfg.root, replace(cfg, mean=(0.0, 0.0)))


IMAGES = np.zeros((4, 3, 8, 8), np.uint8)
LABELS = [0, 1, 0, 1]
BAD_ARRAYS = [
    ({"images": np.array([None, {}], object), "labels": [0, 1]}, "images holds Python objects, .*nothing was unp"),
    ({"images": IMAGES, "labels": np.array(["a", "b", "a", "b"])}, r"labels holds <U1 values, expected numbers"),
    ({"images": IMAGES, "labels": [0, 1]}, r"images holds 4 samples but .*labels 2 labels"),
    ({"images": IMAGES, "labels": [0, -1, 0, 1]}, r"label 1 \(the first is 0\) is -1, expected 0 or more"),
    ({"images": IMAGES, "labels": [0.0, 1, 0, 1]}, r"labels is float64 \[4\], expected whole numbers"),
    ({"images": IMAGES, "labels": np.eye(4)}, r"labels is float64 \[4, 4\], expected whole numbers"),
    ({"images": IMAGES, "labels": [0, 0, 0, 0]}, "all training samples are of one class"),
    ({"images": IMAGES, "labels": [1, 2, 1, 2]}, "class 0 has no training sample, expected labels 0 to 2"),
    ({"images": IMAGES, "labels": [0, 1, 0, 2**40]}, r"is 1099511627776, expected 0 or more"),
    ({"images": IMAGES[:, :, 0, 0], "labels": LABELS}, r"shape \[4, 3\], expected images \[N, C, H, W\]"),
    ({"images": IMAGES[:0], "labels": []}, r"shape \[0, 3, 8, 8\], expected images"),
    ({"images": np.zeros((4, 9, 8, 8), np.uint8), "labels": LABELS}, "which axis holds the channels"),
    ({"images": np.zeros((4, 3, 8, 3), np.uint8), "labels": LABELS}, "which axis holds the channels"),
    ({"images": IMAGES.astype(int) + 300, "labels": LABELS}, "values from 300 to 300, expected 0 to 255"),
    ({"images": np.full((4, 1, 8, 8), np.nan), "labels": LABELS}, "NaN, infinite"),
    ({"images": IMAGES.astype(complex), "labels": LABELS}, "holds complex128 values, expected numbers"),
    ({"images": np.zeros((4, 2, 3, 8, 8)), "labels": LABELS}, r"expected event frames \[N, T, 2, H, W\]"),
    ({"images": np.full((4, 2, 2, 8, 8), 0.5), "labels": LABELS}, "fractions, expected counts of events"),
    ({"images": np.full((4, 2, 2, 8, 8), 300), "labels": LABELS}, "values from 300 to 300, expected 0 to 255"),
    ({"pictures": IMAGES, "labels": LABELS}, "holds pictures, labels, expected x_train, y_train, x_test"),
    ({"x_train": IMAGES, "y_train": LABELS, "x_test": IMAGES, "y_test": [0, 1, 2, 0]}, "sample 2 .* expected 0 to 1"),
    ({"x_train": IMAGES, "y_train": LABELS, "x_test": IMAGES[:, :, 1:], "y_test": LABELS}, "both must agree"),
    ({"images": IMAGES, "labels": LABELS, "classes": np.array(["a"])}, r"has label 1, expected 0 to 0, the classes"),
    ({"images": IMAGES, "labels": LABELS, "classes": np.array([1, 2])}, "expected different texts"),
]  # fmt: skip


@pytest.mark.parametrize(("arrays", "message"), BAD_ARRAYS, ids=[message[:30] for _, message in BAD_ARRAYS])
def test_bad_arrays_are_named_in_one_line(tmp_path, arrays, message):
    np.savez(tmp_path / "bad.npz", **arrays)
    with pytest.raises(ValueError, match=message) as error:
        datasets.load("npz", tmp_path)
    assert str(error.value).startswith(str(tmp_path / "bad.npz"))
    assert "\n" not in str(error.value)


def test_files_that_are_no_npz(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no .npz file in"):
        datasets.load("npz", tmp_path)
    path = tmp_path / "x.npz"
    np.savez(path, images=IMAGES, labels=LABELS)
    sound = path.read_bytes()
    damaged = (b"", b"PK\3\4", pickle.dumps([1]), sound[:-40], sound[:300] + b"\1\1" + sound[302:])
    for content in damaged:
        path.write_bytes(content)
        with pytest.raises(ValueError, match=re.escape(str(path))) as error:
            datasets.load("npz", path)
        assert "\n" not in str(error.value)
    np.savez(tmp_path / "y.npz", images=IMAGES)
    with pytest.raises(ValueError, match=r"holds 2 .npz files, expected one"):
        datasets.load("npz", tmp_path)


# Python


def test_float_images_are_normalised_as_they_are():
    images = rng.normal(3, 2, (40, 2, 6, 7)).astype(np.float64)
    data = datasets.make_dataset("mine", (images, np.arange(40) % 4), (images[:4], range(4)))
    assert data.train.images.dtype == np.float32
    assert data.info.mean == pytest.approx(images.mean((0, 2, 3)), rel=1e-5)
    assert data.info.std == pytest.approx(images.std((0, 2, 3)), rel=1e-5)
    ((x, _),) = make_batches(data.train, data.info, DataConfig(), batch_size=64, device=CPU, shuffle=False).epoch(0)
    assert x.mean((0, 1, 3, 4)).abs().max() < 1e-5
    assert np.array_equal(data.train.images, images.astype(np.float32))  # the batch did not change the samples
    with pytest.raises(ValueError, match=r"data.trivial_augment needs images of bytes \(uint8\), found float32"):
        make_batches(data.train, data.info, DataConfig(trivial_augment=True), batch_size=4, device=CPU, shuffle=True)


def test_a_constant_channel_is_not_divided_by_zero():
    images = np.full((4, 2, 5, 5), 7, np.uint8)
    assert datasets.make_dataset("mine", (images, LABELS), (images, LABELS)).info.std == (1.0, 1.0)


def test_tensors_layout_and_integers():
    images = torch.randint(0, 256, (4, 6, 8, 8))
    split = datasets.from_arrays(images, torch.tensor(LABELS), layout="NCHW")
    assert isinstance(split, datasets.Split)
    assert split.images.dtype == np.uint8
    assert np.array_equal(split.images, images.numpy())
    assert datasets.from_arrays(images, LABELS, layout="NHWC").images.shape == (4, 8, 6, 8)
    with pytest.raises(ValueError, match="samples differ in shape"):
        datasets.from_arrays([[[1, 2]], [[1]]], [0, 1])


class Pairs(torch.utils.data.Dataset):
    def __init__(self, samples, labels):
        self.samples, self.labels = samples, labels

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        return self.samples[i], self.labels[i]


def test_torch_data_sets_become_splits():
    images = rng.integers(0, 256, (6, 8, 9, 3), dtype=np.uint8)
    labels = [0, 1, 2, 0, 1, 2]
    expected = images.transpose(0, 3, 1, 2)
    same(
        datasets.from_dataset(Pairs([Image.fromarray(i) for i in images], labels)),
        datasets.Split(expected, np.array(labels)),
    )
    same(
        datasets.from_dataset(Pairs(torch.from_numpy(expected.copy()), torch.tensor(labels))),
        datasets.Split(expected, np.array(labels)),
    )
    floats = datasets.from_dataset(Pairs(torch.from_numpy(expected / 255).float(), np.array(labels)))
    assert floats.images.dtype == np.float32
    frames = torch.randint(0, 5, (6, 4, 2, 8, 8))
    assert np.array_equal(datasets.from_dataset(Pairs(frames, labels)).frames, frames)
    for bad, message in (
        (Pairs([torch.zeros(1, 4, 4), torch.zeros(1, 5, 4)], [0, 1]), r"sample 1 is float32 \[1, 5, 4\], the first is"),
        (Pairs([torch.zeros(1, 4, 4)] * 2, [0, 1.5]), "label 1 is '1.5', expected a whole number"),
        (Pairs([], []), "holds no samples"),
        (iter([]), "expected a data set with a length"),
        ([1, 2], "item 0 is a int, expected a pair"),
        (Pairs(["a"], [0]), "holds <U1 values, expected numbers"),
    ):
        with pytest.raises(ValueError, match=message):
            datasets.from_dataset(bad)


def blobs(cfg: DataConfig):
    images = np.random.default_rng(cfg.split_seed or 0).integers(0, 256, (9, 1, 8, 8), dtype=np.uint8)
    return (images, np.arange(9) % 3), Pairs(torch.from_numpy(images[:3]), [0, 1, 2])


def test_registered_functions_and_classes():
    datasets.register_dataset("blobs")(blobs)
    data = datasets.load("blobs", cfg=DataConfig(name="blobs", split_seed=4))
    assert (data.name, data.info.classes, data.info.channels) == ("blobs", ("0", "1", "2"), 1)

    @datasets.register_dataset("named")
    class Named:
        classes = ("x", "y", "z")

        def __init__(self, cfg):
            self.train, self.test = blobs(cfg)

        def augment(self, images, draws):
            return images

    data = datasets.load("named")
    assert data.info.classes == ("x", "y", "z")
    assert data.augment is not None
    assert datasets.describe(DataConfig(name="named")) == data.info
    datasets.register_dataset("whole")(lambda cfg: data)
    assert datasets.load("whole").name == "whole"


@pytest.mark.parametrize("name", ["digits", "folder", "npz", "recordings", "blobs"])
def test_a_name_that_exists_is_refused(name):
    datasets.register_dataset("blobs")(blobs)
    with pytest.raises(ValueError, match=f"a data set '{name}' exists already; register yours under another name"):
        datasets.register_dataset(name)(blobs)
    assert list(REGISTERED) == ["blobs"]


def test_a_registered_function_that_returns_something_else():
    datasets.register_dataset("odd")(lambda cfg: 3)
    with pytest.raises(
        ValueError, match=r"the data set 'odd' returned a int, expected a multifire.datasets.Dataset, a pair"
    ):
        datasets.load("odd")
    with pytest.raises(ValueError, match="unknown data set 'ood'; did you mean odd"):
        datasets.load("ood")


# The configuration of a run


def test_the_configuration_describes_own_data_without_reading_them(digits_folder):
    cfg = RunConfig(data=DataConfig(name="folder", root=str(digits_folder)))
    data = datasets.load("folder", digits_folder)
    full = datasets.complete(cfg, data)
    assert full.data.classes == data.info.classes
    assert full.data.shape == (1, 28, 28)
    again = from_json(to_json(full), "config.json")
    assert again == full
    elsewhere = datasets.describe(replace(again.data, root="/nowhere"))
    assert elsewhere == replace(data.info, published_sizes=(0, 0))
    assert datasets.complete(full, datasets.load("folder", digits_folder, full.data)) == full
    assert datasets.describe(cfg.data) == data.info
    with pytest.raises(ValueError, match=r"are known when its samples are read; use multifire.datasets.describe"):
        datasets.get_info("folder")


def test_data_that_differ_from_the_run_are_refused(digits_folder, tmp_path):
    cfg = DataConfig(name="folder", root=str(digits_folder), shape=(1, 32, 32))
    with pytest.raises(ValueError, match=r"shape 1 28 28, expected data.shape 1 32 32; give the data that the run"):
        datasets.load("folder", digits_folder, cfg)
    with pytest.raises(ValueError, match=r"data.mean has 3 numbers, but folder has 1 channels; give one for each"):
        datasets.load("folder", digits_folder, replace(cfg, shape=None, mean=(0.0, 0.0, 0.0)))
    with pytest.raises(ValueError, match=r"data.classes is given, but has no effect for digits; leave it out"):
        datasets.load("digits", cfg=DataConfig(classes=("a", "b")))


def test_complete_fills_in_what_own_data_say_and_leaves_known_data_sets_alone(digits):
    cfg = RunConfig()
    assert datasets.complete(cfg, digits).data == cfg.data
    given_numbers = replace(cfg, model=replace(cfg.model, in_channels=7, num_classes=3))
    assert datasets.complete(given_numbers, digits) == given_numbers
    mine = datasets.complete(given_numbers, replace(digits, name="mine"))
    assert mine.data.name == "mine"
    assert (mine.model.in_channels, mine.model.num_classes) == (1, 10)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("size", "32", "data.size is '32', expected two numbers such as"),
        ("size", "0x4", "data.size is '0x4', expected two numbers"),
        ("sensor", "346,260", "data.sensor is '346,260', expected two numbers"),
        ("channels", 2, r"data.channels is 2, expected 1 \(grey\) or 3 \(RGB\)"),
        ("test_share", 0.0, "data.test_share is 0.0, expected 0 < fraction < 1"),
        ("classes", ("a",), "data.classes is .*, expected two or more names"),
        ("std", (0.0,), "data.std is .*, expected numbers above 0"),
        ("mixup", 2.0, "data.mixup is 2.0, expected 0 <= mixup <= 1"),
        ("random_erasing", -0.1, "data.random_erasing is -0.1, expected 0 <= probability <= 1"),
    ],
)
def test_options_out_of_range_are_refused(field, value, message):
    with pytest.raises(ValueError, match=message):
        RunConfig(data=DataConfig(**{field: value}))
