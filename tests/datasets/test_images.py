"""Readers of CIFAR-10 and idx files: folders, archives, damaged files, and malicious archives."""

import gzip
import importlib.util
import io
import logging
import re
import subprocess
import sys
import tarfile
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from multifire import datasets
from multifire.datasets import images

BINS = [f"data_batch_{i}.bin" for i in range(1, 6)] + ["test_batch.bin"]
IDX = [f"{part}-ubyte" for part in ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1")]
FASHION = Path("/usr/share/datasets/fashion-mnist")
SHARED = Path(__file__).parents[3] / "shared"
RECORD = 3073

rng = np.random.default_rng(0)


def cifar_batch(records: int) -> bytes:
    content = rng.integers(0, 256, (records, RECORD), dtype=np.uint8)
    content[:, 0] %= 10
    return content.tobytes()


@pytest.fixture(scope="module")
def batches() -> dict[str, bytes]:
    return {name: cifar_batch(2 + i) for i, name in enumerate(BINS)}


def write(folder: Path, files: dict[str, bytes]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def make_tar(members: list[tuple[tarfile.TarInfo, bytes]], format: int = tarfile.GNU_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format) as archive:
        for info, content in members:
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def member(name: str, content: bytes = b"", kind: bytes = tarfile.REGTYPE, link: str = ""):
    info = tarfile.TarInfo(name)
    info.type, info.size, info.linkname = kind, len(content), link
    return info, content


def official_members(batches: dict[str, bytes]) -> list[tuple[tarfile.TarInfo, bytes]]:
    """Return the members of the official archive."""
    folder = images.CIFAR_SUBFOLDER
    return [
        member(folder, kind=tarfile.DIRTYPE),
        member(f"{folder}/batches.meta.txt", b"airplane\n"),
        *(member(f"{folder}/{name}", content) for name, content in batches.items()),
        member(f"{folder}/readme.html", b"<html>"),
    ]


def write_archive(tmp_path: Path, tar: bytes) -> Path:
    return write(tmp_path / "cifar10", {images.CIFAR_ARCHIVE: gzip.compress(tar, 1)}) / images.CIFAR_ARCHIVE


def check_cifar(found: datasets.Dataset, batches: dict[str, bytes]) -> None:
    for split, names in ((found.train, BINS[:5]), (found.test, BINS[5:])):
        content = np.frombuffer(b"".join(batches[name] for name in names), np.uint8).reshape(-1, RECORD)
        assert split.labels.tolist() == content[:, 0].tolist()
        assert split.labels.dtype == np.int64
        assert split.images.flags.writeable
        assert split.images.flags.c_contiguous
        for image, record in zip(split.images, content, strict=True):
            for channel in range(3):  # the planes R, G and B, each row by row
                plane = record[1 + 1024 * channel : 1025 + 1024 * channel]
                assert image[channel].tolist() == plane.reshape(32, 32).tolist()


@pytest.mark.parametrize("inside", ["cifar10", f"cifar10/{images.CIFAR_SUBFOLDER}", ".", images.CIFAR_SUBFOLDER])
def test_cifar_batches_are_read_from_a_folder(tmp_path, batches, inside, caplog):
    write(tmp_path / inside, batches)
    with caplog.at_level(logging.WARNING, logger="multifire"):
        check_cifar(datasets.load("cifar10", tmp_path), batches)
    assert caplog.messages == [
        "cifar10 holds 20 training and 7 test samples; the published data set has 50,000 and 10,000"
    ]


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
@pytest.mark.parametrize("inside", ["cifar10", "."])
def test_cifar_batches_are_read_from_the_archive(tmp_path, batches, format, inside):
    tar = make_tar(official_members(batches), format)
    write(tmp_path / inside, {images.CIFAR_ARCHIVE: gzip.compress(tar)})
    before = sorted(tmp_path.rglob("*"))
    check_cifar(datasets.load("cifar10", tmp_path), batches)
    assert sorted(tmp_path.rglob("*")) == before


def test_archive_with_extended_headers_is_read(tmp_path, batches):
    members = official_members(batches)
    for info, _ in members:
        info.pax_headers = {"comment": "x" * 5000, "mtime": "1.5"}
    write_archive(tmp_path, make_tar(members, tarfile.PAX_FORMAT))
    check_cifar(datasets.load("cifar10", tmp_path), batches)


def test_members_are_read_by_base_name_and_links_are_ignored(tmp_path, batches):
    hostile = [
        member("../../evil.bin", b"evil"),
        member(str(tmp_path / "absolute.bin"), b"evil"),
        member(BINS[0], kind=tarfile.SYMTYPE, link="/etc/passwd"),
        member(BINS[1], kind=tarfile.LNKTYPE, link="../../evil.bin"),
        member(BINS[2], kind=tarfile.DIRTYPE),
        member(BINS[3], kind=tarfile.FIFOTYPE),
        member(BINS[4], kind=tarfile.CHRTYPE),
    ]
    with_folders = [member(f"../../{name}", content) for name, content in list(batches.items())[:3]]
    with_folders += [member(f"/{name}", content) for name, content in list(batches.items())[3:]]
    root = tmp_path / "a" / "b" / "c"
    write_archive(root, make_tar(hostile + with_folders))
    before = sorted(tmp_path.rglob("*"))
    check_cifar(datasets.load("cifar10", root), batches)
    assert sorted(tmp_path.rglob("*")) == before


def test_link_is_not_accepted_in_place_of_a_batch(tmp_path, batches):
    members = [member(name, content) for name, content in batches.items()]
    members[3] = member(BINS[3], kind=tarfile.SYMTYPE, link=BINS[0])
    path = write_archive(tmp_path, make_tar(members))
    with pytest.raises(ValueError, match=f"^{re.escape(str(path))}: holds no data_batch_4.bin; delete it and download"):
        datasets.load("cifar10", tmp_path)


def test_duplicate_batch_in_the_archive_is_refused(tmp_path, batches):
    members = [*official_members(batches), member(f"other/{BINS[2]}", cifar_batch(1))]
    write_archive(tmp_path, make_tar(members))
    with pytest.raises(ValueError, match=r"holds data_batch_3\.bin twice; delete it and download it again"):
        datasets.load("cifar10", tmp_path)


@pytest.mark.parametrize("size", [images.MAX_MEMBER + 1, 8**11 - 1])
def test_member_that_is_too_large_is_refused(tmp_path, size):
    info, _ = member("data_batch_1.bin")
    info.size = size
    write_archive(tmp_path, info.tobuf() + bytes(10_000))
    with pytest.raises(ValueError, match=rf"member 'data_batch_1\.bin' claims {size:,} bytes, too many for CIFAR"):
        datasets.load("cifar10", tmp_path)


@pytest.mark.parametrize("size", [8**12, -1])
def test_member_size_in_binary_is_refused(tmp_path, size):
    info, _ = member("data_batch_1.bin")
    info.size = size
    write_archive(tmp_path, info.tobuf(format=tarfile.GNU_FORMAT) + bytes(10_000))
    with pytest.raises(ValueError, match="damaged, or no tar archive"):
        datasets.load("cifar10", tmp_path)


@pytest.mark.parametrize("after_end", [False, True])
def test_archive_that_expands_too_far_is_refused(tmp_path, after_end):
    """The archive's 3 MB expand to 576 MiB, as members that are each small enough or as padding after the end mark."""
    info, _ = member("more")
    info.size = 64 << 20
    header = bytes(512) if after_end else info.tobuf()
    packed = gzip.compress(header + bytes(64 << 20), 1) * 9
    write(tmp_path / "cifar10", {images.CIFAR_ARCHIVE: packed})
    with pytest.raises(ValueError, match="unpacks to more than 536,870,912 bytes, too many for CIFAR"):
        datasets.load("cifar10", tmp_path)


@pytest.mark.parametrize("keep", [0, 1, 15, 2000, -4, -9])
def test_error_of_a_damaged_archive_names_its_path(tmp_path, batches, keep):
    path = write_archive(tmp_path, make_tar(official_members(batches)))
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=f"^{re.escape(str(path))}: .*; delete it and download it again$"):
        datasets.load("cifar10", tmp_path)


def test_flipped_bit_in_the_archive_is_detected(tmp_path, batches):
    path = write_archive(tmp_path, make_tar(official_members(batches)))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"damaged.*; delete it and download it again$"):
        datasets.load("cifar10", tmp_path)


def test_html_page_in_place_of_the_archive_is_refused(tmp_path):
    write(tmp_path / "cifar10", {images.CIFAR_ARCHIVE: b"<html>Please log in to this network.</html>"})
    with pytest.raises(ValueError, match="damaged, or no tar archive; delete it and download it again"):
        datasets.load("cifar10", tmp_path)


def test_truncated_batch_in_the_archive_is_refused(tmp_path, batches):
    path = write_archive(tmp_path, make_tar(official_members({**batches, BINS[1]: batches[BINS[1]][:-5]})))
    with pytest.raises(ValueError, match=rf"{path.name}: data_batch_2\.bin: cut short: has 9,214 bytes"):
        datasets.load("cifar10", tmp_path)


@pytest.mark.parametrize("size", [0, 1, RECORD - 1, 2 * RECORD + 7])
def test_truncated_batch_is_refused(tmp_path, batches, size):
    folder = write(tmp_path / "cifar10", {**batches, BINS[2]: bytes(size)})
    message = f"{folder / BINS[2]}: cut short: has {size:,} bytes, expected a multiple of 3,073"
    with pytest.raises(ValueError, match=re.escape(message)):
        datasets.load("cifar10", tmp_path)


def test_label_out_of_range_is_refused(tmp_path, batches):
    content = bytearray(cifar_batch(5))
    content[3 * RECORD] = 200
    folder = write(tmp_path / "cifar10", {**batches, BINS[5]: bytes(content)})
    message = f"{folder / BINS[5]}: record 3 (the first is 0) has label 200, expected 0 to 9"
    with pytest.raises(ValueError, match=re.escape(message)):
        datasets.load("cifar10", tmp_path)


def test_batch_that_is_too_large_is_refused(tmp_path, batches):
    folder = write(tmp_path / "cifar10", batches)
    with (folder / BINS[0]).open("r+b") as file:
        file.truncate(images.MAX_MEMBER + 1)
    with pytest.raises(ValueError, match=r"data_batch_1\.bin: has more than 67,108,864 bytes"):
        datasets.load("cifar10", tmp_path)


def test_error_for_a_missing_batch_names_the_download_command(tmp_path, batches):
    folder = write(tmp_path / "cifar10", batches)
    (folder / BINS[2]).unlink()
    message = (
        f"{folder} has no {BINS[2]}, only the rest of cifar10; run `multifire data download cifar10 --root {tmp_path}`"
    )
    with pytest.raises(FileNotFoundError, match=re.escape(message)):
        datasets.load("cifar10", tmp_path)


def test_archive_is_read_if_a_batch_is_missing(tmp_path, batches):
    write_archive(tmp_path, make_tar(official_members(batches)))
    write(tmp_path / "cifar10", {BINS[0]: b"left over"})
    check_cifar(datasets.load("cifar10", tmp_path), batches)


@pytest.mark.parametrize("name", ["cifar10", "mnist", "fashion-mnist"])
def test_error_for_a_missing_data_set_names_the_download_command(tmp_path, name):
    root = tmp_path / "no such folder"
    with pytest.raises(FileNotFoundError) as caught:
        datasets.load(name, root)
    message = str(caught.value)
    assert message.startswith(f"no {name} in {root / name}, ")
    assert f"expected {datasets.DATASETS[name].downloads[0].filename}" in message
    assert message.endswith(f"run `multifire data download {name} --root '{root}'`")


def test_error_for_an_empty_folder_names_the_expected_files(tmp_path):
    folder = write(tmp_path / "cifar10", {})
    with pytest.raises(
        FileNotFoundError, match=rf"^{re.escape(str(folder))} is empty, expected {images.CIFAR_ARCHIVE} or "
    ):
        datasets.load("cifar10", tmp_path)


def test_file_in_place_of_the_root_folder_is_an_error(tmp_path):
    (tmp_path / "data").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match="data is a file, expected the folder that holds the data sets"):
        datasets.load("mnist", tmp_path / "data")


def idx(array: np.ndarray) -> bytes:
    return bytes((0, 0, 8, array.ndim)) + np.array(array.shape, dtype=">u4").tobytes() + array.tobytes()


def idx_files(train: int = 6, test: int = 4) -> dict[str, bytes]:
    contents = []
    for count in (train, test):
        contents.append(idx(rng.integers(0, 256, (count, 28, 28), dtype=np.uint8)))
        contents.append(idx(rng.integers(0, 10, count, dtype=np.uint8)))
    return dict(zip(IDX, contents, strict=True))


def pack(files: dict[str, bytes], packed: bool = True) -> dict[str, bytes]:
    return {f"{name}.gz": gzip.compress(content, 1) for name, content in files.items()} if packed else files


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("inside", ["mnist", "."])
def test_idx_files_are_read(tmp_path, packed, inside, caplog):
    files = idx_files()
    write(tmp_path / inside, pack(files, packed))
    found = datasets.load("mnist", tmp_path)
    for split, names in ((found.train, IDX[:2]), (found.test, IDX[2:])):
        pixels = np.frombuffer(files[names[0]], np.uint8, offset=16).reshape(-1, 1, 28, 28)
        assert np.array_equal(split.images, pixels)
        assert split.images.flags.writeable
        assert split.labels.tolist() == list(files[names[1]][8:])
    assert caplog.messages == [
        "mnist holds 6 training and 4 test samples; the published data set has 60,000 and 10,000"
    ]


def test_folder_of_one_data_set_is_not_read_as_another(tmp_path):
    folder = write(tmp_path / "fashion-mnist", pack(idx_files()))
    datasets.load("fashion-mnist", folder)
    with pytest.raises(FileNotFoundError, match=f"no mnist in {re.escape(str(folder))}/mnist: expected"):
        datasets.load("mnist", folder)


def test_error_for_missing_idx_files_names_them(tmp_path):
    files = pack(idx_files())
    del files[f"{IDX[1]}.gz"], files[f"{IDX[2]}.gz"]
    write(tmp_path / "mnist", files)
    with pytest.raises(
        FileNotFoundError, match=f"mnist has no {IDX[1]}.gz, {IDX[2]}.gz, only the rest of mnist; run `mu"
    ):
        datasets.load("mnist", tmp_path)


BAD_IMAGES = {
    "empty": (b"", "cut short within its header, after 0 bytes"),
    "two bytes": (b"\0\0", "cut short within its header, after 2 bytes"),
    "half a header": (idx(np.zeros((1, 28, 28), np.uint8))[:11], "cut short within its header, after 11 bytes"),
    "a page": (b"<html>", "no idx file of this kind: starts with 3c 68 74 6d, expected 00 00 08 03"),
    "labels": (
        idx(np.zeros(6, np.uint8)),
        "no idx file of this kind: starts with 00 00 08 01, expected 00 00 08 03 (unsigned bytes, dimensions: 3)",
    ),
    "no image": (idx(np.zeros((0, 28, 28), np.uint8)), "its header says 0 × 28 × 28, expected N >= 1 × 28 × 28"),
    "other size": (idx(np.zeros((1, 28, 32), np.uint8)), "its header says 1 × 28 × 32, expected N >= 1 × 28 × 28"),
    "cut short": (
        idx(np.zeros((6, 28, 28), np.uint8))[:-3],
        "cut short: 4,701 of 4,704 bytes that its header announces",
    ),
    "goes on": (idx(np.zeros((6, 28, 28), np.uint8)) + b"!", "goes on after 4,704 bytes that its header announces"),
    "absurd": (
        bytes((0, 0, 8, 3, 255, 255, 255, 255, 0, 0, 0, 28, 0, 0, 0, 28)),
        "its header claims 3,367,254,359,280 bytes, more than the",
    ),
    "other count": (idx(np.zeros((5, 28, 28), np.uint8)), f"holds 5 images but {IDX[1]}"),
}


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("case", BAD_IMAGES)
def test_invalid_idx_images_are_refused(tmp_path, case, packed):
    content, message = BAD_IMAGES[case]
    folder = write(tmp_path / "mnist", pack({**idx_files(), IDX[0]: content}, packed))
    path = folder / (IDX[0] + ".gz" * packed)
    with pytest.raises(ValueError, match=f"^{re.escape(str(path))}:? {re.escape(message)}") as caught:
        datasets.load("mnist", tmp_path)
    assert "download" in str(caught.value)


def test_idx_label_out_of_range_is_refused(tmp_path):
    folder = write(tmp_path / "mnist", {**idx_files(), IDX[3]: idx(np.array([1, 2, 10, 11], np.uint8))})
    message = f"{folder / IDX[3]}: record 2 (the first is 0) has label 10, expected 0 to 9"
    with pytest.raises(ValueError, match=re.escape(message)):
        datasets.load("mnist", tmp_path)


@pytest.mark.parametrize("keep", [3, 12, 60, -8, -1])
def test_damaged_gzip_file_is_refused(tmp_path, keep):
    files = pack(idx_files())
    name = f"{IDX[0]}.gz"
    folder = write(tmp_path / "mnist", {**files, name: files[name][:keep]})
    with pytest.raises(ValueError, match=f"^{re.escape(str(folder / name))}: .*; delete it and download it again$"):
        datasets.load("mnist", tmp_path)


def test_gzip_bomb_is_not_decompressed(tmp_path):
    """A file whose header announces six images goes on with 256 MiB of zeros."""
    bomb = gzip.compress(idx(np.zeros((6, 28, 28), np.uint8))) + gzip.compress(bytes(64 << 20), 1) * 4
    write(tmp_path / "mnist", {**pack(idx_files()), f"{IDX[0]}.gz": bomb})
    tracemalloc.start()
    with pytest.raises(ValueError, match="goes on after 4,704 bytes that its header announces"):
        datasets.load("mnist", tmp_path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2 << 20


FUZZ = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@st.composite
def corrupted(draw, intact: bytes) -> bytes:
    """Draw an intact file with bytes changed, inserted or deleted, or with its end cut off; or draw random bytes."""
    if draw(st.booleans()) and draw(st.booleans()):
        return draw(st.binary(max_size=2000))
    content = bytearray(intact)
    for _ in range(draw(st.integers(1, 4))):
        # Parsers are most likely to fail on headers, so half of the changes fall into the first bytes.
        position = draw(st.integers(0, min(700, len(content))) | st.integers(0, len(content)))
        change = draw(st.sampled_from(["set", "insert", "delete", "cut"]))
        new = draw(st.binary(min_size=1, max_size=12))
        if change == "set":
            content[position : position + len(new)] = new
        elif change == "insert":
            content[position:position] = new
        elif change == "delete":
            del content[position : position + len(new)]
        else:
            del content[position:]
    return bytes(content)


def assert_only_value_errors(read, *args) -> None:
    """Assert that a reader either succeeds or raises a ValueError whose message is one line and names the file."""
    message = "fuzzed"
    try:
        read(*args)
    except ValueError as error:
        message = str(error)
    assert "fuzzed" in message or images.CIFAR_ARCHIVE in message
    assert "\n" not in message


INTACT_IDX = idx_files(train=3)[IDX[0]]
INTACT_TAR = make_tar(official_members({name: cifar_batch(1) for name in BINS}))


@FUZZ
@given(corrupted(INTACT_IDX))
def test_idx_reader_raises_only_value_errors(tmp_path, content):
    path = tmp_path / "fuzzed"
    for written in (content, gzip.compress(content, 1)):
        path.write_bytes(written)
        assert_only_value_errors(images.read_idx, path, (28, 28))
        assert_only_value_errors(images.read_idx, path, ())


@FUZZ
@given(corrupted(gzip.compress(INTACT_IDX, 1)))
def test_idx_reader_raises_only_value_errors_for_gzip_files(tmp_path, content):
    path = tmp_path / "fuzzed"
    path.write_bytes(content)
    assert_only_value_errors(images.read_idx, path, (28, 28))


@FUZZ
@given(corrupted(INTACT_TAR), st.booleans())
def test_cifar_reader_raises_only_value_errors_for_archives(tmp_path, content, packed):
    path = tmp_path / images.CIFAR_ARCHIVE
    path.write_bytes(gzip.compress(content, 1) if packed else content)
    assert_only_value_errors(images.read_cifar10, [path])
    assert [found.name for found in tmp_path.iterdir()] == [path.name]


@FUZZ
@given(corrupted(gzip.compress(INTACT_TAR, 1)))
def test_cifar_reader_raises_only_value_errors_for_gzip_files(tmp_path, content):
    path = tmp_path / images.CIFAR_ARCHIVE
    path.write_bytes(content)
    assert_only_value_errors(images.read_cifar10, [path])


@FUZZ
@given(corrupted(cifar_batch(2)))
def test_cifar_reader_raises_only_value_errors_for_batches(tmp_path, content):
    path = tmp_path / "fuzzed.bin"
    path.write_bytes(content)
    assert_only_value_errors(images.read_cifar10, [path] * 6)


@pytest.mark.slow
@pytest.mark.skipif(not FASHION.is_dir(), reason="needs the Debian package dataset-fashion-mnist")
def test_real_fashion_mnist_is_read(caplog):
    found = datasets.load("fashion-mnist", FASHION)
    assert caplog.messages == []
    assert found.train.images.shape == (60_000, 1, 28, 28)
    assert np.bincount(found.train.labels).tolist() == [6_000] * 10
    assert np.bincount(found.test.labels).tolist() == [1_000] * 10
    pixels = found.train.images / 255
    assert pixels.mean() == pytest.approx(found.info.mean[0], abs=1e-4)
    assert pixels.std() == pytest.approx(found.info.std[0], abs=1e-4)


@pytest.mark.skipif(
    not (SHARED / "tools/unpack_cifar10.py").is_file(), reason="needs the folder shared beside the repository"
)
@pytest.mark.skipif(importlib.util.find_spec("PIL") is None, reason="needs pillow")
def test_real_cifar10_images_are_read(tmp_path):
    tool = [sys.executable, SHARED / "tools/unpack_cifar10.py", tmp_path / "cifar10", "--train", "200", "--test", "50"]
    subprocess.run(tool, check=True, capture_output=True)
    found = datasets.load("cifar10", tmp_path)
    assert found.train.images.shape == (200, 3, 32, 32)
    assert found.test.images.shape == (50, 3, 32, 32)
    assert set(found.train.labels.tolist()) == set(range(10))
    mean = (found.train.images / 255).mean((0, 2, 3))
    assert mean == pytest.approx(found.info.mean, abs=0.03)
    across = np.abs(np.diff(found.train.images.astype(int), axis=3)).mean()
    assert across < 20  # neighbouring pixels are similar only if the planes are laid out correctly
