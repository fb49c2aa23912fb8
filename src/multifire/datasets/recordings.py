"""What `data prepare` works through: a source of jobs, each some recordings and the samples cut out of them."""

import hashlib
import io
import re
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from multifire.datasets import archives
from multifire.datasets.registry import get_info
from multifire.events import Recording, open_recording

TRAIN, TEST = "train", "test"


class Opener(Protocol):
    """Where a recording lies; opened anew for each pass over it, in whichever process."""

    def open(self) -> Recording: ...


@dataclass(frozen=True)
class InFile:
    path: Path
    sensor_size: tuple[int, int] | None = None
    """Where the data set says it, and the file need not."""

    def open(self) -> Recording:
        return open_recording(self.path, self.path.name, self.sensor_size)


@dataclass(frozen=True)
class InZip:
    archive: Path
    member: str

    def open(self) -> Recording:
        data = archives.read_zip_member(self.archive, self.member)
        return open_recording(io.BytesIO(data), f"{self.archive.name}: {self.member}")


@dataclass(frozen=True)
class Sample:
    """What becomes one row of a split; the window [start_us, end_us) is the whole recording by default."""

    name: str
    label: int
    split: str
    start_us: int | None = None
    end_us: int | None = None


@dataclass(frozen=True)
class Job:
    """What one worker does at a time."""

    key: str
    """Names the part that it becomes; parts are joined in the order of their keys."""
    recordings: tuple[tuple[Opener, tuple[Sample, ...]], ...]
    spooled: Path | None = None
    """A copy on disk of the recording, to be deleted when the job is done."""


@dataclass(frozen=True)
class Source:
    """The recordings of a data set, as they were found."""

    files: tuple[Path, ...]
    """What a person would name: archives or folders."""
    total: int
    """Recordings in it; where only a whole pass would tell, those that were published."""
    fingerprint: str
    """Changes when the recordings do."""
    jobs: Callable[[Container[str], Path], Iterator[Job]]
    """The jobs but for those whose keys are in the container; a folder takes copies of recordings that need one."""


def fingerprint(files: Sequence[Path], names: Iterable[str] = ()) -> str:
    """Digest of the archives' names, sizes, first and last bytes, and of the names of loose files.

    Not of all their bytes, which may be gigabytes: an archive keeps its own list at one end.
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
    """Jobs of `size` recordings each, which are whole samples."""

    def jobs(done: Container[str], spool: Path) -> Iterator[Job]:
        for start in range(0, len(recordings), size):
            key = f"{start:08}"
            if key not in done:
                part = recordings[start : start + size]
                yield Job(key, tuple((opener, (sample,)) for opener, sample in part))

    return jobs


@dataclass(frozen=True)
class Found:
    """A recording in a folder or a zip archive: its path there, and how to open it."""

    name: str
    opener: Opener
    size: int = 0


def list_recordings(place: Path, pattern: str, most: int) -> list[Found]:
    """The files of a folder, or of a zip archive, whose path within ends as the pattern says.

    Raises:
        ValueError: a damaged archive, or a file that is larger than `most`.
    """
    matches = re.compile(rf"(?:.*/)?{pattern}").fullmatch
    if place.is_file():
        return [Found(name, InZip(place, name)) for name in archives.zip_members(place, most) if matches(name)]
    found = []
    for path in sorted(place.rglob("*")):
        name = path.relative_to(place).as_posix()
        if matches(name) and path.is_file():
            size = path.stat().st_size
            archives.check_size(name, size, most, place)
            found.append(Found(name, InFile(path), size))
    return found


def absent(name: str, place: Path, expected: str) -> FileNotFoundError:
    """The error for a source that holds no recordings: what was expected, and how to get it."""
    info = get_info(name)
    get = f"`multifire data download {name}` gets it" if info.downloads else info.fetch
    return FileNotFoundError(
        f"no recordings of {name} in {place}: expected {expected}; {get}; "
        f"put it into that folder, or give --source where it lies"
    )
