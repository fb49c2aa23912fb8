"""Read the files in an archive without unpacking it. The archive may come from a stranger.

Members are refused before any byte is inflated if their name leads out of the archive's folder, or if they claim more
bytes than a valid file has, overlap, are encrypted or use a rare compression.
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
"""Maximum unpacked size of an archive; DVS128 Gesture, the largest, has less than a tenth of it."""
CHUNK = 1 << 20


@contextlib.contextmanager
def open_unpacked(path: Path) -> Iterator[io.BufferedIOBase]:
    """Open a file for reading; inflate it if its content is gzipped, whatever its name."""
    with path.open("rb") as file:
        packed = file.read(2) == b"\x1f\x8b"
        file.seek(0)
        with gzip_errors(path):
            yield gzip.GzipFile(fileobj=file) if packed else file


@contextlib.contextmanager
def gzip_errors(path: Path) -> Iterator[None]:
    """Turn gzip's errors into a ValueError."""
    try:
        yield
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: damaged ({' '.join(str(error).split())}); {AGAIN}") from None


def tar_header(header: bytes, path: Path) -> tuple[str, bytes, int]:
    """Return name, kind and size of the member with this header."""
    size, checksum = (re.fullmatch(rb"[ \0]*([0-7]*)[ \0]*", field) for field in (header[124:136], header[148:156]))
    expected = sum(header) - sum(header[148:156]) + 8 * ord(" ")
    if len(header) < TAR_BLOCK or not size or not checksum or int(checksum[1] or b"0", 8) != expected:
        raise ValueError(f"{path}: damaged, or no tar archive; {AGAIN}")
    name = header[:100].partition(b"\0")[0].decode("utf-8", "replace")
    return name, header[156:157], int(size[1] or b"0", 8)


class TarMember:
    """A file in a tar archive; it must be read once, in the archive's order."""

    def __init__(self, stream: io.BufferedIOBase, name: str, size: int, path: Path):
        self.name, self.size, self.remaining = name, size, size
        self._stream, self._path = stream, path

    def read(self, count: int) -> bytes:
        """Return up to `count` bytes; none at the member's end.

        Raises:
            ValueError: the archive ends within the member.
        """
        with gzip_errors(self._path):  # the loop that opened the archive does not catch errors of the reader
            block = self._stream.read(min(count, self.remaining))
        if not block and self.remaining and count:
            raise ValueError(f"{self._path}: cut short within member {self.name!r}; {AGAIN}")
        self.remaining -= len(block)
        return block

    def copy_to(self, target: Path) -> None:
        with target.open("wb") as file:
            while block := self.read(CHUNK):
                file.write(block)

    def skip(self) -> None:
        while self.read(CHUNK):
            pass


def tar_members(path: Path, most: int) -> Iterator[TarMember]:
    """Yield the regular files of a tar archive, gzipped or not, in one pass to the end of the stream.

    Args:
        path: the archive.
        most: maximum size of a member in bytes.

    Raises:
        ValueError: damaged, truncated, a member larger than `most`, too large in total, or a name outside the folder.
    """
    with open_unpacked(path) as stream:
        total = 0
        while (header := stream.read(TAR_BLOCK)) not in (b"", bytes(TAR_BLOCK)):
            name, kind, size = tar_header(header, path)
            check_name(name, path)
            if kind in b"123456":  # links, devices and folders have no content, whatever size they claim
                size = 0
            check_size(name, size, most, path)
            total = check_total(total + size, path)
            member = TarMember(stream, name, size, path)
            if kind in b"0\0":
                yield member
            member.skip()
            stream.read(-size % TAR_BLOCK)
        while block := stream.read(CHUNK):  # gzip's checksum lies at the end
            total = check_total(total + len(block), path)


def zip_members(path: Path, most: int) -> list[str]:
    """Return the names of the files in a zip archive, for `read_zip_member`.

    Args:
        path: the archive.
        most: maximum size of a member in bytes.

    Raises:
        ValueError: damaged, or a member that is refused; see the head of this module.
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
    """Return a member's content after checking its checksum.

    Raises:
        ValueError: damaged.
    """
    with zip_errors(path):
        return _opened(path, path.stat().st_mtime_ns).read(name)


@functools.lru_cache(maxsize=1)
def _opened(path: Path, written: int) -> zipfile.ZipFile:
    """Open an archive and keep it open in this process: reading the list of N-MNIST's 60,000 members is slow."""
    return zipfile.ZipFile(path)


@contextlib.contextmanager
def zip_errors(path: Path) -> Iterator[None]:
    """Turn zipfile's errors into a ValueError."""
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
    """Return all bytes of a small stream.

    Raises:
        ValueError: more than `most` bytes.
    """
    data = b""
    while block := file.read(most + 1 - len(data)):
        data += block
    if len(data) > most:
        raise ValueError(f"{where}: has more than {most:,} bytes, too many for a file of this kind")
    return data
