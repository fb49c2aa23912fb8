"""Sources of recordings for `multifire data prepare`: jobs of recordings, and the samples to cut out of them."""

import hashlib
import io
import re
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from multifire.config import DataConfig
from multifire.datasets import archives
from multifire.datasets.classes import divide, natural
from multifire.datasets.registry import get_info
from multifire.events import Recording, Stray, open_recording

TRAIN, TEST = "train", "test"


class Opener(Protocol):
    """Place of a recording; it is opened for each pass, in any process."""

    def open(self, stray: Stray = "refuse") -> Recording: ...


@dataclass(frozen=True)
class InFile:
    path: Path
    sensor_size: tuple[int, int] | None = None
    """Known from the data set if the file does not state it."""
    unit_us: int | None = None
    """µs of the unit of time, known from the data set if the file does not state it."""

    def open(self, stray: Stray = "refuse") -> Recording:
        return open_recording(self.path, self.path.name, self.sensor_size, stray, self.unit_us)


@dataclass(frozen=True)
class InZip:
    archive: Path
    member: str
    sensor_size: tuple[int, int] | None = None

    def open(self, stray: Stray = "refuse") -> Recording:
        data = archives.read_zip_member(self.archive, self.member)
        return open_recording(io.BytesIO(data), f"{self.archive.name}: {self.member}", self.sensor_size, stray)


@dataclass(frozen=True)
class Sample:
    """One row of a split; the window [start_us, end_us) is the whole recording by default."""

    name: str
    label: int
    split: str
    start_us: int | None = None
    end_us: int | None = None


@dataclass(frozen=True)
class Job:
    """Work of one worker at a time."""

    key: str
    """Name of its part; parts are joined in the order of their keys."""
    recordings: tuple[tuple[Opener, tuple[Sample, ...]], ...]
    spooled: Path | None = None
    """Copy of the recording on disk, deleted after the job."""


@dataclass(frozen=True)
class Source:
    """The recordings of a data set."""

    files: tuple[Path, ...]
    """Archives or folders, for messages."""
    total: int
    """Number of recordings; the published one if counting would take a whole pass."""
    fingerprint: str
    """Changes when the recordings do."""
    jobs: Callable[[Container[str], Path], Iterator[Job]]
    """Jobs without those whose keys are in the container; the folder is for copies of recordings."""
    classes: tuple[str, ...] = ()
    """Names of the classes, if the data set is not in the registry."""
    sensor: tuple[int, ...] = ()
    """Height and width of the sensor, if the data set is not in the registry."""


def fingerprint(files: Sequence[Path], names: Iterable[str] = ()) -> str:
    """Return a digest of the archives' names, sizes, first and last bytes, and of the names of loose files.

    It does not cover all bytes, which may be gigabytes; an archive's own list lies at one of its ends.
    """
    sha = hashlib.sha256()
    for path in files:
        if path.is_file():
            size = path.stat().st_size
            sha.update(f"{path.name} {size}\n".encode())
            with path.open("rb") as file:
                sha.update(file.read(1 << 20))
                file.seek(max(size - (1 << 20), 0))
                sha.update(file.read(1 << 20))
    for name in names:
        sha.update(f"{name}\n".encode())
    return sha.hexdigest()


def chunked(recordings: Sequence[tuple[Opener, Sample]], size: int) -> Callable[[Container[str], Path], Iterator[Job]]:
    """Return jobs of `size` recordings each; every recording is one sample."""

    def jobs(done: Container[str], spool: Path) -> Iterator[Job]:
        for start in range(0, len(recordings), size):
            key = f"{start:08}"
            if key not in done:
                part = recordings[start : start + size]
                yield Job(key, tuple((opener, (sample,)) for opener, sample in part))

    return jobs


@dataclass(frozen=True)
class Found:
    """A recording in a folder or a zip archive: its path, and how to open it."""

    name: str
    opener: Opener
    size: int = 0

    @property
    def folder(self) -> str:
        """Name of the folder that holds it."""
        return self.name.split("/")[-2]


def list_recordings(location: Path, pattern: str, most: int, sensor_size: tuple[int, int] | None = None) -> list[Found]:
    """Return the files of a folder or zip archive whose path matches the pattern at its end.

    `sensor_size` is the (H, W) of the data set's sensor, if the files do not state it.

    Raises:
        ValueError: a damaged archive, or a file larger than `most`.
    """
    matches = re.compile(rf"(?:.*/)?{pattern}").fullmatch
    if location.is_file():
        members = filter(matches, archives.zip_members(location, most))
        return [Found(name, InZip(location, name, sensor_size)) for name in members]
    found = []
    for path in sorted(location.rglob("*")):
        name = path.relative_to(location).as_posix()
        if matches(name) and path.is_file():
            size = path.stat().st_size
            archives.check_size(name, size, most, location)
            found.append(Found(name, InFile(path, sensor_size), size))
    return found


def source_of(
    files: Sequence[Path], found: Iterable[Found], recordings: Sequence[tuple[Opener, Sample]], size: int
) -> Source:
    """Return the source of recordings that are one sample each, in jobs of `size`."""
    names = (f"{item.name} {item.size}" for item in found)
    return Source(tuple(files), len(recordings), fingerprint(files, names), chunked(recordings, size))


def source_by_folder(
    files: Sequence[Path], found: Iterable[Found], cfg: DataConfig, location: Path, expected: str, size: int
) -> Source:
    """Return the source of a data set without an official split, whose recordings lie in a folder for each class.

    Raises:
        FileNotFoundError: a class is missing; the message names what was `expected`.
        ValueError: a class has one recording, which cannot be in both parts.
    """
    classes = get_info(cfg.name).classes
    found = sorted(found, key=lambda item: natural(item.name))
    items = [(item, classes.index(item.folder)) for item in found]
    if {label for _, label in items} != set(range(len(classes))):
        raise absent(cfg.name, location, expected)
    return source_of(files, found, divided(items, classes, cfg, location), size)


def divided(
    items: Sequence[tuple[Found, int]], classes: tuple[str, ...], cfg: DataConfig, location: Path
) -> list[tuple[Opener, Sample]]:
    """Return the recordings and labels of a data set without an official split, divided by cfg.split_seed.

    Raises:
        ValueError: a class has one recording, which cannot be in both parts.
    """
    held = divide(np.array([label for _, label in items]), classes, cfg, str(location))
    return [
        (item.opener, Sample(f"{classes[label]}/{Path(item.name).stem}", label, TEST if test else TRAIN))
        for (item, label), test in zip(items, held, strict=True)
    ]


def absent(name: str, location: Path, expected: str) -> FileNotFoundError:
    """Return the error for a source without recordings; it names what was expected and how to get it."""
    info = get_info(name)
    get = f"`multifire data download {name}` gets it" if info.downloads else info.fetch
    return FileNotFoundError(
        f"no recordings of {name} in {location}: expected {expected}; {get}; "
        f"put it into that folder, or give its location with --source"
    )
