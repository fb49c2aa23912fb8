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
    """A Split, or an EventSplit if `info.events`."""
    test: Any
    """A Split or EventSplit, like `train`."""


def load(name: str, root: str | Path = "data", cfg: DataConfig | None = None) -> Dataset:
    """Load a data set from `root/name`, or from `root` if its files lie there; prepared events are memory-mapped.

    Args:
        name: one of DATASETS.
        root: folder of the data sets; not used for embedded ones.
        cfg: how recordings are cut into frames (default: that of the recipe of the same name); not used for images.

    Raises:
        ValueError: unknown data set, or a damaged file; names the file and the damage.
        FileNotFoundError: missing, incomplete or unprepared files; names the searched folders and what to do.
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
