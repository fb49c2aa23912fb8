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
from multifire.datasets.unpickle import read_pickle

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
PYTHON_BATCHES = (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch")
PYTHON_SUBFOLDER = "cifar-10-batches-py"
PYTHON_ARCHIVE = "cifar-10-python.tar.gz"
CIFAR_LAYOUTS: tuple[Layout, ...] = (
    CIFAR_FILES,
    ((CIFAR_ARCHIVE,),),
    tuple((name,) for name in PYTHON_BATCHES),
    ((PYTHON_ARCHIVE,),),
)
CIFAR100_FILES = ("train.bin", "test.bin")
CIFAR100_SUBFOLDER = "cifar-100-binary"
CIFAR100_ARCHIVE = "cifar-100-binary.tar.gz"
CIFAR100_LAYOUTS: tuple[Layout, ...] = (tuple((name,) for name in CIFAR100_FILES), ((CIFAR100_ARCHIVE,),))

IDX_FILES: Layout = tuple(
    (stem, f"{stem}.gz")
    for stem in (
        "train-images-idx3-ubyte",
        "train-labels-idx1-ubyte",
        "t10k-images-idx3-ubyte",
        "t10k-labels-idx1-ubyte",
    )
)

# Valid files are much smaller: 30 MB for a CIFAR batch, 185 MB for its archive, 47 MB for MNIST's training images. Of
# CIFAR-100, all 50,000 training images are one file of 154 MB.
MAX_MEMBER = 64 << 20
MAX_CIFAR100 = 256 << 20
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
        folders = [folder for home in homes for folder in (home, home / CIFAR_SUBFOLDER, home / PYTHON_SUBFOLDER)]
        paths = find(name, info, root, folders, CIFAR_LAYOUTS)
        return read_cifar10(paths, classes=len(info.classes))
    if name == "cifar100":
        folders = [folder for home in homes for folder in (home, home / CIFAR100_SUBFOLDER)]
        paths = find(name, info, root, folders, CIFAR100_LAYOUTS)
        return read_cifar100(paths, classes=len(info.classes))
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
    expected = " or ".join(", ".join(names[-1] for names in layout) for layout in sorted(layouts, key=len))
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
    """Read CIFAR-10 in its official binary or Python format.

    Args:
        paths: an archive alone, or the five training batches and the test batch, in this order.
        classes: labels are 0 .. classes - 1.

    Raises:
        ValueError: a damaged, truncated or too large file, a label out of range, a missing batch, or a pickle that
            holds anything but arrays and plain values.

    Source: https://www.cs.toronto.edu/~kriz/cifar.html, "Binary version" and "Python version".
    """
    batches = []
    for name, data, where in _contents(paths, (CIFAR_ARCHIVE, (*CIFAR_TRAIN, CIFAR_TEST)), MAX_MEMBER):
        read_batch = _cifar_records if name.endswith(".bin") else read_python_batch
        batches.append(read_batch(data, where, classes))
    return _join(batches[:-1]), _join(batches[-1:])


def read_cifar100(paths: list[Path], classes: int = 100) -> tuple[Arrays, Arrays]:
    """Read CIFAR-100, with its fine labels, in its official binary format.

    Args:
        paths: the archive alone, or train.bin and test.bin.
        classes: labels are 0 .. classes - 1.

    Raises:
        ValueError: a damaged, truncated or too large file, a label out of range, or a missing file.

    Source: https://www.cs.toronto.edu/~kriz/cifar.html, "Binary version".
    """
    train, test = (
        _join([_cifar_records(data, where, classes, labels=2)])
        for _, data, where in _contents(paths, (CIFAR100_ARCHIVE, CIFAR100_FILES), MAX_CIFAR100)
    )
    return train, test


def _contents(paths: list[Path], binary: tuple[str, tuple[str, ...]], most: int) -> Iterator[tuple[str, bytes, str]]:
    """Yield name, content and place of each file; `binary` is the name of the binary archive and of its files."""
    if len(paths) > 1:
        for path in paths:
            yield path.name, _read_bounded(path, most), str(path)
        return
    names = binary[1] if paths[0].name == binary[0] else PYTHON_BATCHES
    files = read_tar(paths[0], names, most)
    for name in names:
        yield name, files.pop(name), f"{paths[0]}: {name}"


def _read_bounded(path: Path, most: int) -> bytes:
    with path.open("rb") as file:
        data = file.read(min(path.stat().st_size, most) + 1)
    if len(data) > most:
        raise ValueError(f"{path}: has more than {most:,} bytes, too many for a file of CIFAR; {AGAIN}")
    return data


def _cifar_records(data: bytes, where: str, classes: int, labels: int = 1) -> Arrays:
    """Parse records of label bytes, of which the last counts, and 3,072 pixel bytes (planes R, G, B), as views."""
    size = CIFAR_RECORD - 1 + labels
    if not data or len(data) % size:
        raise ValueError(
            f"{where}: cut short: has {len(data):,} bytes, expected a multiple of {size:,} "
            f"(records of {'one label' if labels == 1 else 'two labels'} and 3,072 pixels); {AGAIN}"
        )
    records = np.frombuffer(data, np.uint8).reshape(-1, size)
    _check_labels(records[:, labels - 1], where, classes)
    return records[:, labels:].reshape(-1, 3, 32, 32), records[:, labels - 1]


def read_python_batch(data: bytes, where: str, classes: int) -> Arrays:
    """Parse a batch of the Python version: a dict with the pixels of each image in a row, and a list of labels."""
    content = read_pickle(data, where)
    fields = {}
    if isinstance(content, dict):
        fields = {key.decode("latin1") if isinstance(key, bytes) else key: value for key, value in content.items()}
    pixels, labels = fields.get("data"), fields.get("labels")
    if not isinstance(pixels, np.ndarray) or not isinstance(labels, list):
        raise ValueError(f"{where}: holds no array `data` and list `labels`, as a batch of CIFAR-10 does; {AGAIN}")
    if pixels.dtype != np.uint8 or pixels.shape != (len(labels), 3 * 32 * 32) or not labels:
        raise ValueError(
            f"{where}: its data are {pixels.dtype} {list(pixels.shape)}, expected uint8 [{len(labels)}, 3072], "
            f"a row for each of N >= 1 labels; {AGAIN}"
        )
    if not all(type(label) is int and 0 <= label < 256 for label in labels):
        raise ValueError(f"{where}: holds a label that is no number from 0 to {classes - 1}; {AGAIN}")
    numbers = np.array(labels, np.uint8)
    _check_labels(numbers, where, classes)
    return pixels.reshape(-1, 3, 32, 32), numbers


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


def read_tar(path: Path, wanted: tuple[str, ...], most: int = MAX_MEMBER) -> dict[str, bytes]:
    """Return the content of the regular files with these base names in a tar archive, gzipped or not.

    Only the classic header is read, which gives three guarantees that tarfile does not: bounded memory, no links and
    extended headers, and a ValueError for any damage.

    Raises:
        ValueError: damaged, too large, or a wanted file is missing or occurs twice.
    """
    found: dict[str, bytes] = {}
    with open_unpacked(path) as stream:
        for name, content in _tar_files(stream, path, most):
            if name in found:
                raise ValueError(f"{path}: holds {name} twice; {AGAIN}")
            if name in wanted:
                found[name] = content
    missing = [name for name in wanted if name not in found]
    if missing:
        raise ValueError(f"{path}: holds no {', '.join(missing)}; {AGAIN}")
    return found


def _tar_files(stream: io.BufferedIOBase, path: Path, most: int) -> Iterator[tuple[str, bytes]]:
    """Yield base name and content of each regular file, and read the stream to its end."""
    total = 0
    while (header := stream.read(TAR_BLOCK)) not in (b"", bytes(TAR_BLOCK)):
        name, kind, size = tar_header(header, path)
        if kind in b"123456":  # links, devices, folders: no content follows, whatever size they claim
            size = 0
        padded = size + -size % TAR_BLOCK
        if size > most:
            raise ValueError(f"{path}: member {name!r} claims {size:,} bytes, too many for CIFAR; {AGAIN}")
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
        raise ValueError(f"{path}: unpacks to more than {MAX_ARCHIVE:,} bytes, too many for CIFAR; {AGAIN}")
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
