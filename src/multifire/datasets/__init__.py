"""Data sets by name. This module imports neither torch nor NumPy: the readers come in when something is loaded."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from multifire.config import unknown

if TYPE_CHECKING:
    import numpy as np

log = logging.getLogger("multifire")

DIGIT_NAMES = ("0", "1", "2", "3", "4", "5", "6", "7", "8", "9")
CIFAR10_NAMES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
FASHION_NAMES = ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")


@dataclass(frozen=True)
class Download:
    """One file of a data set, as its authors publish it."""

    url: str
    filename: str
    size: int
    """Bytes."""
    checksum: str
    """algorithm:hexdigest."""


@dataclass(frozen=True)
class DatasetInfo:
    """What is known of a data set before it is read."""

    about: str
    channels: int
    size: int
    """Height and width of an image, in pixels."""
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    """Mean of each channel over the training images, with pixels in 0..1."""
    std: tuple[float, ...]
    """Standard deviation of each channel, likewise."""
    published_sizes: tuple[int, int]
    """Training and test images."""
    downloads: tuple[Download, ...] = ()
    """Empty where the data set is embedded in the package."""


def _idx_downloads(base_url: str, sizes_and_md5s: dict[str, tuple[int, str]]) -> tuple[Download, ...]:
    return tuple(
        Download(f"{base_url}/{filename}", filename, size, f"md5:{md5}")
        for filename, (size, md5) in sizes_and_md5s.items()
    )


DATASETS: dict[str, DatasetInfo] = {
    "digits": DatasetInfo(
        about="5,000 MNIST digits, embedded",
        channels=1,
        size=28,
        classes=DIGIT_NAMES,
        mean=(0.1307,),
        std=(0.3081,),
        published_sizes=(4_000, 1_000),
    ),
    "cifar10": DatasetInfo(
        about="CIFAR-10: small colour photographs of ten kinds of thing",
        channels=3,
        size=32,
        classes=CIFAR10_NAMES,
        mean=(0.4914, 0.4822, 0.4465),
        std=(0.2023, 0.1994, 0.2010),
        published_sizes=(50_000, 10_000),
        downloads=(
            Download(
                url="https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
                filename="cifar-10-binary.tar.gz",
                size=170_052_171,
                checksum="sha256:c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
            ),
        ),
    ),
    "mnist": DatasetInfo(
        about="MNIST: handwritten digits",
        channels=1,
        size=28,
        classes=DIGIT_NAMES,
        mean=(0.1307,),
        std=(0.3081,),
        published_sizes=(60_000, 10_000),
        downloads=_idx_downloads(
            "https://ossci-datasets.s3.amazonaws.com/mnist",
            {
                "train-images-idx3-ubyte.gz": (9_912_422, "f68b3c2dcbeaaa9fbdd348bbdeb94873"),
                "train-labels-idx1-ubyte.gz": (28_881, "d53e105ee54ea40749a09fcbcd1e9432"),
                "t10k-images-idx3-ubyte.gz": (1_648_877, "9fb629c4189551a2d022fa330f9573f3"),
                "t10k-labels-idx1-ubyte.gz": (4_542, "ec29112dd5afa0611ce80d1b7f02629c"),
            },
        ),
    ),
    "fashion-mnist": DatasetInfo(
        about="Fashion-MNIST: grey pictures of clothes",
        channels=1,
        size=28,
        classes=FASHION_NAMES,
        mean=(0.2860,),
        std=(0.3530,),
        published_sizes=(60_000, 10_000),
        downloads=_idx_downloads(
            "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com",
            {
                "train-images-idx3-ubyte.gz": (26_421_880, "8d4fb7e6c68d591d4c3dfef9ec88bf0d"),
                "train-labels-idx1-ubyte.gz": (29_515, "25c81989df183df01b3e8a0aad5dffbe"),
                "t10k-images-idx3-ubyte.gz": (4_422_102, "bef4ecab320f06d8554ea6380940ec79"),
                "t10k-labels-idx1-ubyte.gz": (5_148, "bb300cfdad3c16e7a12a480ee83cd310"),
            },
        ),
    ),
}


@dataclass(frozen=True, eq=False)
class Split:
    """Images [N, C, H, W] uint8 and their labels [N] int64."""

    images: "np.ndarray"
    labels: "np.ndarray"

    def __post_init__(self):
        assert self.images.ndim == 4
        assert self.images.dtype == "uint8"
        assert self.labels.dtype == "int64"
        assert self.labels.shape == self.images.shape[:1]

    def __len__(self) -> int:
        return len(self.labels)

    def pick(self, index: "np.ndarray") -> "Split":
        """The samples that `index` (positions, or a mask) names."""
        return Split(self.images[index], self.labels[index])


@dataclass(frozen=True)
class Dataset:
    """A data set in memory."""

    name: str
    info: DatasetInfo
    train: Split
    test: Split


def get_info(name: str) -> DatasetInfo:
    """What is known of the data set `name`.

    Raises:
        ValueError: no such data set; names the nearest one.
    """
    if name not in DATASETS:
        raise unknown("data set", name, DATASETS)
    return DATASETS[name]


def load(name: str, root: str | Path = "data") -> Dataset:
    """Read a data set from `root/name`, or from `root` itself where that holds its files.

    Args:
        name: one of DATASETS.
        root: folder of the data sets; an embedded one needs none.

    Raises:
        ValueError: no such data set, or a file of it is damaged; names the file and what is wrong with it.
        FileNotFoundError: its files are missing or half-downloaded; says where it looked and how to get them.
    """
    info = get_info(name)
    from multifire.datasets import images

    train, test = (Split(*arrays) for arrays in images.read(name, info, Path(root)))
    if (len(train), len(test)) != info.published_sizes:
        log.warning(
            "%s holds %s training and %s test images; the published data set has %s and %s",
            name, *(f"{count:,}" for count in (len(train), len(test), *info.published_sizes)),
        )  # fmt: skip
    return Dataset(name, info, train, test)


def hold_out(split: Split, share: float, seed: int) -> tuple[Split, Split]:
    """Split off the same share of every class, chosen by `seed`: (training, validation), each in its old order.

    Raises:
        ValueError: not 0 < share < 1, one side would be empty, or seed is below 0.
    """
    import numpy as np

    if not 0 < share < 1:
        raise ValueError(f"validation share is {share}, expected 0 < share < 1")
    rng = np.random.default_rng(_entropy(seed, 0))
    held = np.zeros(len(split), dtype=bool)
    for label in np.unique(split.labels):
        members = rng.permutation(np.flatnonzero(split.labels == label))
        held[members[: int(share * len(members) + 0.5)]] = True
    if held.all() or not held.any():
        side, change = ("training", "smaller") if held.all() else ("validation", "larger")
        raise ValueError(
            f"holding out a share of {share} of each class of {len(split):,} images leaves none for {side}; "
            f"choose a {change} share"
        )
    return split.pick(~held), split.pick(held)


def take(split: Split, limit: int, seed: int) -> Split:
    """The first `limit` samples of an order that `seed` fixes, or all where there are fewer.

    Raises:
        ValueError: limit is below 1, or seed below 0.
    """
    import numpy as np

    if limit < 1:
        raise ValueError(f"limit is {limit}, expected at least 1")
    if limit >= len(split):
        return split
    return split.pick(np.random.default_rng(_entropy(seed, 1)).permutation(len(split))[:limit])


def _entropy(seed: int, purpose: int) -> list[int]:
    if seed < 0:
        raise ValueError(f"seed is {seed}, expected at least 0")
    return [seed, purpose]
