"""Own recordings of an event camera in folders of classes: train/CLASS/FILE and test/CLASS/FILE, or CLASS/FILE."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from multifire.config import DataConfig
from multifire.config.schema import parse_size
from multifire.datasets import cache
from multifire.datasets.classes import find_home, list_classes
from multifire.datasets.recordings import Opener, Sample, Source, chunked, fingerprint
from multifire.datasets.registry import OWN_DATA, DatasetInfo
from multifire.datasets.splits import EventSplit
from multifire.events import Recording, Stray, open_recording

SUFFIXES = (
    ".aedat",
    ".aedat4",
    ".bin",
    ".raw",
    ".dat",
    ".h5",
    ".hdf5",
    ".npz",
    ".npy",
    ".txt",
    ".csv",
    ".mat",
    ".evt2",
    ".evt3",
)
"""Endings of recordings; other files in the folders, such as notes, are not read."""
CHUNK = 8


@dataclass(frozen=True)
class OwnRecording:
    """A recording that must be of a sensor of `size` (H, W)."""

    path: Path
    size: tuple[int, int]
    first: str
    """Name of the recording that decided the size; empty if the user did."""
    given: bool = False

    def open(self, stray: Stray = "refuse") -> Recording:
        recording = open_recording(self.path, str(self.path), self.size if self.given else None, stray)
        if recording.sensor_size != self.size:
            recording.close()
            raise _other_sensor(self.path, recording.sensor_size, self.size, self.first)
        return recording


def _other_sensor(path: Path, found: tuple[int, int] | None, expected: tuple[int, int], first: str) -> ValueError:
    sizes = [f"{size[1]}x{size[0]}" if size else "of no known size" for size in (found, expected)]
    why = f"like {first}" if first else "as data.sensor says"
    return ValueError(
        f"{path}: its sensor is {sizes[0]}, expected {sizes[1]} {why}; take it away, or give --data.sensor"
    )


def find(location: Path, cfg: DataConfig) -> Source:
    """Find the recordings of each class in the folder `location`.

    Raises:
        FileNotFoundError: no recordings.
        ValueError: one class, an empty class, an unknown sensor; or see `list_classes`.
    """
    listing = list_classes(location, SUFFIXES, replace(cfg, classes=None), "recordings")
    size, first = _sensor(listing.files[0].path, cfg)
    recordings: list[tuple[Opener, Sample]] = []
    names = []
    for file in listing.files:
        name = file.path.relative_to(location).as_posix()
        recordings.append(
            (OwnRecording(file.path, size, first, bool(cfg.sensor)), Sample(name, file.label, file.split))
        )
        stat = file.path.stat()
        names.append(f"{name} {stat.st_size} {stat.st_mtime_ns} {file.label} {file.split}")
    return Source(
        (location,),
        len(recordings),
        fingerprint((), names),
        chunked(recordings, CHUNK),
        classes=listing.classes,
        sensor=size,
    )


def _sensor(path: Path, cfg: DataConfig) -> tuple[tuple[int, int], str]:
    """Return (H, W) of the sensor and the recording that decided it."""
    if cfg.sensor:
        width, height = parse_size(cfg.sensor, "data.sensor")
        return (height, width), ""
    with open_recording(path, str(path)) as recording:
        if recording.sensor_size is None:
            raise ValueError(f"{path}: does not state its sensor's size; give it with --data.sensor, such as 346x260")
        return recording.sensor_size, str(path)


def home(root: Path) -> Path:
    """Return the folder of the recordings under `root`; see `find_home`."""
    return find_home(root, "recordings")


def describe(root: Path, cfg: DataConfig) -> DatasetInfo:
    """Return the description of prepared recordings.

    Raises:
        FileNotFoundError, ValueError: not prepared, or damaged; see `multifire.datasets.cache.read_record`.
    """
    record = cache.read_record(cache.cache_folder(cfg, root), cfg, root)
    height, width = record.sensor
    return DatasetInfo(
        about=OWN_DATA["recordings"],
        channels=2,
        size=height,
        classes=tuple(record.classes),
        mean=(),
        std=(),
        published_sizes=(len(record.splits["train"].labels), len(record.splits["test"].labels)),
        events=True,
        width=width if width != height else None,
    )


def in_order(
    classes: tuple[str, ...] | None, info: DatasetInfo, *splits: EventSplit
) -> tuple[DatasetInfo, EventSplit, EventSplit]:
    """Return the description and the two splits with the classes in the given order, if they are the same ones."""
    train, test = splits
    if classes is None or sorted(classes) != sorted(info.classes):
        return info, train, test
    numbers = np.array([classes.index(name) for name in info.classes])
    train, test = (replace(split, labels=numbers[split.labels]) for split in (train, test))
    return replace(info, classes=classes), train, test
