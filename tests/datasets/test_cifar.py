"""CIFAR-100, and the Python version of CIFAR-10: the same arrays as the binary version, and no evil pickle."""

import gzip
import io
import pickle
import runpy
import tarfile
from pathlib import Path

import numpy as np
import pytest

from multifire import datasets
from multifire.datasets import images

BINARY = [f"data_batch_{i}.bin" for i in range(1, 6)] + ["test_batch.bin"]
MAKE_INPUTS = Path(__file__).parents[3] / "shared" / "field" / "make_inputs.py"
rng = np.random.default_rng(0)


def records(count: int, labels: int = 1, classes: int = 10) -> np.ndarray:
    content = rng.integers(0, 256, (count, labels + 3072), dtype=np.uint8)
    content[:, :labels] %= classes
    return content


@pytest.fixture(scope="module")
def batches() -> dict[str, np.ndarray]:
    return {name: records(3 + i) for i, name in enumerate(BINARY)}


def write(folder: Path, files: dict[str, bytes]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def write_tar(path: Path, files: dict[str, bytes]) -> Path:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(buffer.getvalue(), 1))
    return path


def pickled(content: np.ndarray, protocol: int, text: bool = False) -> bytes:
    batch = {
        b"batch_label": b"training batch",
        b"labels": content[:, 0].tolist(),
        b"data": content[:, 1:].copy(),
        b"filenames": [b"image.png"] * len(content),
    }
    return pickle.dumps({key.decode(): value for key, value in batch.items()} if text else batch, protocol)


def python_files(batches: dict[str, np.ndarray], protocol: int = 2, text: bool = False) -> dict[str, bytes]:
    return {name.removesuffix(".bin"): pickled(content, protocol, text) for name, content in batches.items()}


def check_same(found: datasets.Dataset, expected: datasets.Dataset) -> None:
    for split in ("train", "test"):
        one, other = getattr(found, split), getattr(expected, split)
        assert np.array_equal(one.images, other.images)
        assert np.array_equal(one.labels, other.labels)
        assert one.images.flags.writeable


@pytest.mark.parametrize("text", [False, True])
@pytest.mark.parametrize("protocol", range(6))
def test_the_python_version_equals_the_binary_one(tmp_path, batches, protocol, text):
    write(tmp_path / "a" / "cifar10", {name: content.tobytes() for name, content in batches.items()})
    expected = datasets.load("cifar10", tmp_path / "a")
    for inside in ("cifar10", "cifar10/cifar-10-batches-py", ".", "cifar-10-batches-py"):
        root = tmp_path / "folder" / inside.replace("/", "-")
        write(root / inside, python_files(batches, protocol, text))
        check_same(datasets.load("cifar10", root), expected)
    files = {f"cifar-10-batches-py/{name}": data for name, data in python_files(batches, protocol, text).items()}
    write_tar(
        tmp_path / "tar" / "cifar10" / "cifar-10-python.tar.gz", {**files, "cifar-10-batches-py/readme.html": b""}
    )
    check_same(datasets.load("cifar10", tmp_path / "tar"), expected)


class Evil:
    def __reduce__(self):
        return print, ("code from a data file ran",)


BAD_BATCHES = [
    ({b"labels": [0], b"data": Evil()}, "holds '__builtin__.print', which may run code"),
    ([1, 2], "holds no array `data` and list `labels`"),
    ({b"labels": [0]}, "holds no array `data` and list `labels`"),
    ({b"labels": [0], b"data": np.zeros((2, 3072), np.uint8)}, r"uint8 \[2, 3072\], expected uint8 \[1, 3072\]"),
    ({b"labels": [0], b"data": np.zeros((1, 3072), np.int16)}, r"int16 \[1, 3072\], expected uint8"),
    ({b"labels": [], b"data": np.zeros((0, 3072), np.uint8)}, "a row for each of N >= 1 labels"),
    ({b"labels": [10], b"data": np.zeros((1, 3072), np.uint8)}, "has label 10, expected 0 to 9"),
    ({b"labels": [-1], b"data": np.zeros((1, 3072), np.uint8)}, "a label that is no number from 0 to 9"),
    ({b"labels": ["a"], b"data": np.zeros((1, 3072), np.uint8)}, "a label that is no number from 0 to 9"),
]


@pytest.mark.parametrize(("content", "message"), BAD_BATCHES, ids=[message[:25] for _, message in BAD_BATCHES])
def test_bad_batches_are_refused_in_one_line(tmp_path, batches, content, message, capfd):
    files = python_files(batches) | {"data_batch_3": pickle.dumps(content, 2)}
    write(tmp_path / "cifar-10-batches-py", files)
    with pytest.raises(ValueError, match=message) as error:
        datasets.load("cifar10", tmp_path)
    assert str(error.value).startswith(str(tmp_path / "cifar-10-batches-py" / "data_batch_3"))
    assert "\n" not in str(error.value)
    write_tar(tmp_path / "t" / "cifar-10-python.tar.gz", {f"x/{name}": data for name, data in files.items()})
    with pytest.raises(ValueError, match=message):
        datasets.load("cifar10", tmp_path / "t")
    assert capfd.readouterr() == ("", "")


@pytest.mark.skipif(not MAKE_INPUTS.is_file(), reason="needs the folder shared beside the repository")
def test_batches_from_the_field(tmp_path, capfd):
    pytest.importorskip("h5py")
    make = runpy.run_path(str(MAKE_INPUTS))["main"]
    make(tmp_path)
    capfd.readouterr()
    found = datasets.load("cifar10", tmp_path)
    good = tmp_path / "cifar-10-batches-py"
    binary = {}
    for name in BINARY:
        batch = pickle.loads((good / name.removesuffix(".bin")).read_bytes())  # our own file
        binary[name] = np.insert(batch[b"data"], 0, batch[b"labels"], axis=1).tobytes()
    write(tmp_path / "binary" / "cifar10", binary)
    check_same(found, datasets.load("cifar10", tmp_path / "binary"))
    (good / "data_batch_1").write_bytes((tmp_path / "evil-batches-py" / "data_batch_1").read_bytes())
    with pytest.raises(ValueError, match=r"data_batch_1: holds '__builtin__.print', which may run code"):
        datasets.load("cifar10", tmp_path)
    assert "code from a data file ran" not in capfd.readouterr().out


def test_a_missing_python_batch_is_named(tmp_path, batches):
    files = python_files(batches)
    del files["test_batch"]
    write(tmp_path / "cifar-10-batches-py", files)
    with pytest.raises(FileNotFoundError, match="has no test_batch, only the rest of cifar10"):
        datasets.load("cifar10", tmp_path)


# CIFAR-100


@pytest.mark.parametrize("archive", [False, True])
def test_cifar100_is_read_with_its_fine_labels(tmp_path, archive):
    train, test = records(300, 2, 100), records(100, 2, 100)
    train[:100, 1] = np.arange(100)
    files = {"train.bin": train.tobytes(), "test.bin": test.tobytes()}
    if archive:
        members = {f"cifar-100-binary/{name}": content for name, content in files.items()}
        members["cifar-100-binary/fine_label_names.txt"] = b"apple\n"
        write_tar(tmp_path / "cifar100" / "cifar-100-binary.tar.gz", members)
    else:
        write(tmp_path / "cifar100" / "cifar-100-binary", files)
    found = datasets.load("cifar100", tmp_path)
    for split, content in ((found.train, train), (found.test, test)):
        assert np.array_equal(split.labels, content[:, 1])
        assert np.array_equal(split.images, content[:, 2:].reshape(-1, 3, 32, 32))
    assert len(found.info.classes) == 100
    assert list(found.info.classes) == sorted(found.info.classes)


def test_damage_to_cifar100_is_named(tmp_path):
    files = {"train.bin": records(3, 2, 100).tobytes(), "test.bin": records(2, 2, 100).tobytes()}
    folder = write(tmp_path / "cifar100", files)
    (folder / "test.bin").write_bytes(files["test.bin"][:-1])
    with pytest.raises(
        ValueError, match=r"test.bin: cut short: has 6,147 bytes, .*records of two labels and 3,072 pixels"
    ):
        datasets.load("cifar100", tmp_path)
    wrong = bytearray(files["test.bin"])
    wrong[1] = 100
    (folder / "test.bin").write_bytes(wrong)
    with pytest.raises(ValueError, match="has label 100, expected 0 to 99"):
        datasets.load("cifar100", tmp_path)
    (folder / "test.bin").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"has no test.bin, only the rest of cifar100; run `multifire data download"
    ):
        datasets.load("cifar100", tmp_path)


def test_cifar100_is_downloaded_with_a_checksum():
    (item,) = datasets.get_info("cifar100").downloads
    assert item.filename == images.CIFAR100_ARCHIVE
    assert item.checksum.startswith("sha256:")
