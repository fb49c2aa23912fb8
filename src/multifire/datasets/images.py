"""Readers of image data sets, with NumPy only.

Bad input raises a ValueError or FileNotFoundError that names the file. Nothing is extracted to disk, and nothing is
inflated beyond the size of a valid file.
"""

import io
import shlex
from collections.abc import Iterator
from math import prod
from pathlib import Path

import numpy as np

from multifire.datasets.archives import AGAIN, TAR_BLOCK, open_unpacked, tar_header
from multifire.datasets.registry import DATASETS, DatasetInfo

Arrays = tuple[np.ndarray, np.ndarray]
"""Images [N, C, H, W] uint8 and labels [N] int64."""
Layout = tuple[tuple[str, ...], ...]
"""Files of a data set; for each, its possible names."""

CIFAR_TRAIN = tuple(f"data_batch_{i}.bin" for i in range(1, 6))
CIFAR_TEST = "test_batch.bin"
CIFAR_SUBFOLDER = "cifar-10-batches-bin"
CIFAR_ARCHIVE = "cifar-10-binary.tar.gz"
CIFAR_FILES: Layout = tuple((name,) for name in (*CIFAR_TRAIN, CIFAR_TEST))
CIFAR_RECORD = 1 + 3 * 32 * 32

IDX_FILES: Layout = tuple(
    (stem, f"{stem}.gz")
    for stem in (
        "train-images-idx3-ubyte",
        "train-labels-idx1-ubyte",
        "t10k-images-idx3-ubyte",
        "t10k-labels-idx1-ubyte",
    )
)

# Valid files are much smaller: 30 MB for a CIFAR batch, 185 MB for its archive, 47 MB for MNIST's training images.
MAX_MEMBER = 64 << 20
MAX_ARCHIVE = 512 << 20
MAX_IDX = 256 << 20
DEFLATE_RATIO = 1032  # deflate's maximum compression ratio


def read(name: str, info: DatasetInfo, root: Path) -> tuple[Arrays, Arrays]:
    """Read the train and test splits of the data set `name`; see `multifire.datasets.load`."""
    if not info.downloads:
        return read_digits()
    if root.is_file():
        raise FileNotFoundError(f"{root} is a file, expected the folder that holds the data sets")
    # MNIST and Fashion-MNIST have the same file names, so one is not searched in the other's folder.
    homes = [root / name] if root.name in DATASETS and root.name != name else [root / name, root]
    if name == "cifar10":
        folders = [folder for home in homes for folder in (home, home / CIFAR_SUBFOLDER)]
        paths = find(name, info, root, folders, (CIFAR_FILES, ((CIFAR_ARCHIVE,),)))
        return read_cifar10(paths, classes=len(info.classes))
    paths = find(name, info, root, homes, (IDX_FILES,))
    return (
        read_idx_pair(paths[0], paths[1], size=info.size, classes=len(info.classes)),
        read_idx_pair(paths[2], paths[3], size=info.size, classes=len(info.classes)),
    )


def find(name: str, info: DatasetInfo, root: Path, folders: list[Path], layouts: tuple[Layout, ...]) -> list[Path]:
    """Return the files of the first layout that is complete in one of the folders.

    Raises:
        FileNotFoundError: none is complete; names missing files or searched folders, and how to get the files.
    """
    for folder in folders:
        for layout in layouts:
            paths = [_first_file(folder, names) for names in layout]
            if None not in paths:
                return [path for path in paths if path]
    raise FileNotFoundError(_why_missing(name, info, root, folders, layouts))


def _first_file(folder: Path, names: tuple[str, ...]) -> Path | None:
    return next((folder / name for name in names if (folder / name).is_file()), None)


def _why_missing(name: str, info: DatasetInfo, root: Path, folders: list[Path], layouts: tuple[Layout, ...]) -> str:
    for folder in folders:
        for item in info.downloads:
            part = folder / f"{item.filename}.part"
            if folder.name == name and part.is_file():
                return (
                    f"{folder} is half-downloaded: {part.name} has {part.stat().st_size:,} of {item.size:,} bytes; "
                    f"`{_command(name, folder.parent)}` resumes it"
                )
    for folder in folders:
        for layout in layouts:
            absent = [names[-1] for names in layout if not _first_file(folder, names)]
            if len(absent) < len(layout):
                return f"{folder} has no {', '.join(absent)}, only the rest of {name}; run `{_command(name, root)}`"
    home = root / name
    expected = " or ".join(", ".join(names[-1] for names in layout) for layout in reversed(layouts))
    if home.is_dir() and not any(home.iterdir()):
        return f"{home} is empty, expected {expected}; run `{_command(name, root)}`"
    return f"no {name} in {', '.join(map(str, folders))}: expected {expected}; run `{_command(name, root)}`"


def _command(name: str, root: Path) -> str:
    return f"multifire data download {name} --root {shlex.quote(str(root))}"


def read_digits() -> tuple[Arrays, Arrays]:
    """Read the embedded digits, made by tools/make_digits.py: 4,000 for training and 1,000 for testing."""
    with np.load(Path(__file__).with_name("digits.npz"), allow_pickle=False) as file:
        train, test = ((file[f"{name}_images"], file[f"{name}_labels"].astype(np.int64)) for name in ("train", "test"))
    return train, test


def read_cifar10(paths: list[Path], classes: int = 10) -> tuple[Arrays, Arrays]:
    """Read CIFAR-10 in its official binary format.

    Args:
        paths: the archive alone, or data_batch_1.bin ... data_batch_5.bin and test_batch.bin, in this order.
        classes: labels are 0 .. classes - 1.

    Raises:
        ValueError: a damaged, truncated or too large file, a label out of range, or a missing batch.

    Source: https://www.cs.toronto.edu/~kriz/cifar.html, "Binary version".
    """
    if len(paths) == 1:
        files = read_tar(paths[0], (*CIFAR_TRAIN, CIFAR_TEST))
        batches = [_cifar_records(files[name], f"{paths[0]}: {name}", classes) for name in (*CIFAR_TRAIN, CIFAR_TEST)]
    else:
        batches = [_cifar_records(_read_bounded(path), str(path), classes) for path in paths]
    return _join(batches[:-1]), _join(batches[-1:])


def _read_bounded(path: Path) -> bytes:
    with path.open("rb") as file:
        data = file.read(min(path.stat().st_size, MAX_MEMBER) + 1)
    if len(data) > MAX_MEMBER:
        raise ValueError(f"{path}: has more than {MAX_MEMBER:,} bytes, too many for a batch of CIFAR-10; {AGAIN}")
    return data


def _cifar_records(data: bytes, where: str, classes: int) -> Arrays:
    """Parse records of one label byte and 3,072 pixel bytes (planes R, G, B) as views of `data`."""
    if not data or len(data) % CIFAR_RECORD:
        raise ValueError(
            f"{where}: cut short: has {len(data):,} bytes, expected a multiple of {CIFAR_RECORD:,} "
            f"(records of one label and 3,072 pixels); {AGAIN}"
        )
    records = np.frombuffer(data, np.uint8).reshape(-1, CIFAR_RECORD)
    _check_labels(records[:, 0], where, classes)
    return records[:, 1:].reshape(-1, 3, 32, 32), records[:, 0]


def _check_labels(labels: np.ndarray, where: str, classes: int) -> None:
    wrong = np.flatnonzero(labels >= classes)
    if len(wrong):
        raise ValueError(
            f"{where}: record {wrong[0]:,} (the first is 0) has label {labels[wrong[0]]}, "
            f"expected 0 to {classes - 1}; {AGAIN}"
        )


def _join(batches: list[Arrays]) -> Arrays:
    images, labels = zip(*batches, strict=True)
    return np.concatenate(images), np.concatenate(labels).astype(np.int64)


def read_tar(path: Path, wanted: tuple[str, ...]) -> dict[str, bytes]:
    """Return the content of the regular files with these base names in a tar archive, gzipped or not.

    Only the classic header is read, which gives three guarantees that tarfile does not: bounded memory, no links and
    extended headers, and a ValueError for any damage.

    Raises:
        ValueError: damaged, too large, or a wanted file is missing or occurs twice.
    """
    found: dict[str, bytes] = {}
    with open_unpacked(path) as stream:
        for name, content in _tar_files(stream, path):
            if name in found:
                raise ValueError(f"{path}: holds {name} twice; {AGAIN}")
            if name in wanted:
                found[name] = content
    missing = [name for name in wanted if name not in found]
    if missing:
        raise ValueError(f"{path}: holds no {', '.join(missing)}; {AGAIN}")
    return found


def _tar_files(stream: io.BufferedIOBase, path: Path) -> Iterator[tuple[str, bytes]]:
    """Yield base name and content of each regular file, and read the stream to its end."""
    total = 0
    while (header := stream.read(TAR_BLOCK)) not in (b"", bytes(TAR_BLOCK)):
        name, kind, size = tar_header(header, path)
        if kind in b"123456":  # links, devices, folders: no content follows, whatever size they claim
            size = 0
        padded = size + -size % TAR_BLOCK
        if size > MAX_MEMBER:
            raise ValueError(f"{path}: member {name!r} claims {size:,} bytes, too many for CIFAR-10; {AGAIN}")
        total = _bounded(total + TAR_BLOCK + padded, path)
        content = stream.read(padded)
        if len(content) < padded:
            raise ValueError(f"{path}: cut short within member {name!r}; {AGAIN}")
        if kind in b"0\0":
            yield name.rpartition("/")[2], content[:size]
    while block := stream.read(1 << 16):  # to the end of the stream, where gzip's checksum lies
        total = _bounded(total + len(block), path)


def _bounded(total: int, path: Path) -> int:
    if total > MAX_ARCHIVE:
        raise ValueError(f"{path}: unpacks to more than {MAX_ARCHIVE:,} bytes, too many for CIFAR-10; {AGAIN}")
    return total


def read_idx_pair(images: Path, labels: Path, *, size: int, classes: int) -> Arrays:
    """Read grey images [N, 1, size, size] and their labels from two idx files, gzipped or not.

    Raises:
        ValueError: a damaged file, a wrong header, or different numbers of images and labels.

    Source: the format at the foot of https://yann.lecun.com/exdb/mnist/.
    """
    pixels, numbers = read_idx(images, (size, size)), read_idx(labels, ())
    if len(pixels) != len(numbers):
        raise ValueError(
            f"{images} holds {len(pixels):,} images but {labels.name} {len(numbers):,} labels; "
            "delete both and download them again"
        )
    _check_labels(numbers, str(labels), classes)
    return pixels[:, None].copy(), numbers.astype(np.int64)


def read_idx(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    """Read the unsigned bytes [N, *shape] of an idx file, gzipped or not, as a read-only array.

    Raises:
        ValueError: another magic number or shape, no items, or a size that differs from the header.
    """
    magic = bytes((0, 0, 8, 1 + len(shape)))
    with open_unpacked(path) as stream:
        header = stream.read(len(magic) + 4 * magic[-1])
        if header[:4] != magic[: len(header)]:
            raise ValueError(
                f"{path}: no idx file of this kind: starts with {header[:4].hex(' ')}, expected {magic.hex(' ')} "
                f"(unsigned bytes, dimensions: {magic[-1]}); {AGAIN}"
            )
        if len(header) < len(magic) + 4 * magic[-1]:
            raise ValueError(f"{path}: cut short within its header, after {len(header)} bytes; {AGAIN}")
        dims = tuple(np.frombuffer(header, ">u4", offset=4).tolist())
        if dims[0] == 0 or dims[1:] != shape:
            expected = " × ".join(map(str, ("N >= 1", *shape)))
            raise ValueError(f"{path}: its header says {' × '.join(map(str, dims))}, expected {expected}; {AGAIN}")
        count, room = prod(dims), min(MAX_IDX, DEFLATE_RATIO * path.stat().st_size)
        if count > room:
            raise ValueError(f"{path}: its header claims {count:,} bytes, more than the {room:,} it can hold; {AGAIN}")
        data = stream.read(count + 1)
    if len(data) != count:
        found = f"goes on after {count:,}" if len(data) > count else f"cut short: {len(data):,} of {count:,}"
        raise ValueError(f"{path}: {found} bytes that its header announces; {AGAIN}")
    return np.frombuffer(data, np.uint8).reshape(dims)
