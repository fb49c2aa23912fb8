"""Load a data set by name."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from multifire.config import DataConfig, get_recipe
from multifire.datasets.registry import DatasetInfo, get_info
from multifire.datasets.splits import Split
from multifire.utils.log import log


@dataclass(frozen=True)
class Dataset:
    """A data set in memory, or mapped into it."""

    name: str
    info: DatasetInfo
    train: Any
    """A Split, or an EventSplit where `info.events`."""
    test: Any
    """Likewise."""


def load(name: str, root: str | Path = "data", cfg: DataConfig | None = None) -> Dataset:
    """Read a data set from `root/name`, or from `root` itself where that holds its files; map prepared events.

    Args:
        name: one of DATASETS.
        root: folder of the data sets; an embedded one needs none.
        cfg: how recordings are cut into frames (default: as the recipe of the same name does); images need none.

    Raises:
        ValueError: no such data set, or a file of it is damaged; names the file and what is wrong with it.
        FileNotFoundError: its files are missing, half-downloaded or not prepared; says where it looked and what to do.
    """
    info = get_info(name)
    if info.events:
        from multifire.datasets import cache

        train, test = cache.load(name, Path(root), cfg or get_recipe(name).data)
    else:
        from multifire.datasets import images

        train, test = (Split(*arrays) for arrays in images.read(name, info, Path(root)))
    if (len(train), len(test)) != info.published_sizes:
        log.warning(
            "%s holds %s training and %s test samples; the published data set has %s and %s",
            name, *(f"{count:,}" for count in (len(train), len(test), *info.published_sizes)),
        )  # fmt: skip
    return Dataset(name, info, train, test)
