"""Archives from strangers: read in place, never unpacked by the names that they give.

A member whose name leads out of the archive's folder, one that claims more than a sound file holds, members that
overlap, encryption and rare compression are refused before a byte of them is inflated.
"""

import contextlib
import functools
import gzip
import io
import re
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import IO

AGAIN = "delete it and download it again"
TAR_BLOCK = 512
MAX_TOTAL = 64 << 30
"""Bytes that an archive may unpack to; DVS128 Gesture, the largest of them, has less than a tenth."""
CHUNK = 1 << 20


@contextlib.contextmanager
def open_unpacked(path: Path) -> Iterator[io.BufferedIOBase]:
    """The file's bytes, inflated where it is gzipped, whatever its name."""
    with path.open("rb") as file:
        packed = file.read(2) == b"\x1f\x8b"
        file.seek(0)
        with gzip_errors(path):
            yield gzip.GzipFile(fileobj=file) if packed else file


@contextlib.contextmanager
def gzip_errors(path: Path) -> Iterator[None]:
    """gzip's several errors as one."""
    try:
        yield
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: damaged ({' '.join(str(error).split())}); {AGAIN}") from None


def tar_header(header: bytes, path: Path) -> tuple[str, bytes, int]:
    """Name, kind and size of the member that the header announces."""
    size, checksum = (re.fullmatch(rb"[ \0]*([0-7]*)[ \0]*", field) for field in (header[124:136], header[148:156]))
    expected = sum(header) - sum(header[148:156]) + 8 * ord(" ")
    if len(header) < TAR_BLOCK or not size or not checksum or int(checksum[1] or b"0", 8) != expected:
        raise ValueError(f"{path}: damaged, or no tar archive; {AGAIN}")
    name = header[:100].partition(b"\0")[0].decode("utf-8", "replace")
    return name, header[156:157], int(size[1] or b"0", 8)


class TarMember:
    """A file within a tar archive, to be read once and in its turn."""

    def __init__(self, stream: io.BufferedIOBase, name: str, size: int, path: Path):
        self.name, self.size, self.left = name, size, size
        self._stream, self._path = stream, path

    def read(self, count: int) -> bytes:
        """Up to `count` bytes; none at the member's end.

        Raises:
            ValueError: the archive ends before the member does.
        """
        with gzip_errors(self._path):  # the reader of a member is not within the loop that opened the archive
            block = self._stream.read(min(count, self.left))
        if not block and self.left and count:
            raise ValueError(f"{self._path}: cut short within member {self.name!r}; {AGAIN}")
        self.left -= len(block)
        return block

    def copy_to(self, target: Path) -> None:
        with target.open("wb") as file:
            while block := self.read(CHUNK):
                file.write(block)

    def skip(self) -> None:
        while self.read(CHUNK):
            pass


def tar_members(path: Path, most: int) -> Iterator[TarMember]:
    """The regular files of a tar archive, gzipped or not, in one pass and in its order, to the end of the stream.

    Args:
        path: the archive.
        most: bytes that a sound member has at most.

    Raises:
        ValueError: damaged, cut short, a member larger than `most`, too much in all, or a name that leads elsewhere.
    """
    with open_unpacked(path) as stream:
        total = 0
        while (header := stream.read(TAR_BLOCK)) not in (b"", bytes(TAR_BLOCK)):
            name, kind, size = tar_header(header, path)
            check_name(name, path)
            if kind in b"123456":  # links, devices, folders: no content follows, whatever size they claim
                size = 0
            check_size(name, size, most, path)
            total = check_total(total + size, path)
            member = TarMember(stream, name, size, path)
            if kind in b"0\0":
                yield member
            member.skip()
            stream.read(-size % TAR_BLOCK)
        while stream.read(CHUNK):  # gzip keeps its checksum at the end
            pass


def zip_members(path: Path, most: int) -> list[str]:
    """Names of the files in a zip archive, each of which may be read by `read_zip_member`.

    Args:
        path: the archive.
        most: bytes that a sound member has at most.

    Raises:
        ValueError: damaged, or a member that a sound archive does not have; see the head of this module.
    """
    with zip_errors(path), zipfile.ZipFile(path) as file:
        members = [info for info in file.infolist() if not info.is_dir()]
    for info in members:
        check_name(info.filename, path)
        check_size(info.filename, info.file_size, most, path)
        if info.flag_bits & 1 or info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise ValueError(f"{path}: member {info.filename!r} is encrypted or packed in a rare way; {AGAIN}")
    check_total(sum(info.file_size for info in members), path)
    if sum(info.compress_size for info in members) > path.stat().st_size:
        raise ValueError(f"{path}: its members overlap; {AGAIN}")
    return [info.filename for info in members]


def read_zip_member(path: Path, name: str) -> bytes:
    """A member's content, whose checksum holds.

    Raises:
        ValueError: it is damaged.
    """
    with zip_errors(path):
        return _opened(path, path.stat().st_mtime_ns).read(name)


@functools.lru_cache(maxsize=1)
def _opened(path: Path, written: int) -> zipfile.ZipFile:
    """One archive stays open in a worker: the list of N-MNIST's 60,000 members takes a while to read."""
    return zipfile.ZipFile(path)


@contextlib.contextmanager
def zip_errors(path: Path) -> Iterator[None]:
    """zipfile's many errors as one."""
    try:
        yield
    except FileNotFoundError:
        raise
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, KeyError, ValueError, OSError) as error:
        raise ValueError(f"{path}: damaged, or no zip archive ({' '.join(str(error).split())}); {AGAIN}") from None


def check_name(name: str, path: Path) -> None:
    parts = PurePosixPath(name.replace("\\", "/"))
    if parts.is_absolute() or ".." in parts.parts or re.match(r"[A-Za-z]:", name):
        raise ValueError(f"{path}: member {name!r} would leave its folder: no sound archive; do not use it")


def check_size(name: str, size: int, most: int, path: Path) -> None:
    if size > most:
        raise ValueError(
            f"{path}: member {name!r} claims {size:,} bytes, expected at most {most:,} in such an archive; {AGAIN}"
        )


def check_total(total: int, path: Path) -> int:
    if total > MAX_TOTAL:
        raise ValueError(f"{path}: unpacks to more than {MAX_TOTAL:,} bytes: no sound archive; {AGAIN}")
    return total


def read_all(file: IO[bytes] | TarMember, most: int, where: str) -> bytes:
    """All bytes of something small.

    Raises:
        ValueError: there are more than `most`.
    """
    data = b""
    while block := file.read(most + 1 - len(data)):
        data += block
    if len(data) > most:
        raise ValueError(f"{where}: has more than {most:,} bytes, too many for what it is called")
    return data
