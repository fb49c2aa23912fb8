"""Write files atomically, lock files and folders, and check the free disk space."""

import contextlib
import errno
import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any


def older(path: Path, age: int) -> Path:
    """Return the file in which `write_atomic` keeps the version of `path` from `age` writes ago."""
    return path.with_suffix(f".{age}{path.suffix}") if age else path


def is_full_disk(error: OSError) -> bool:
    """Return True if the error says that a disk, or the user's share of it, is full."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


@contextlib.contextmanager
def explain_full_disk(folder: Path, advice: str) -> Iterator[None]:
    """Turn the error of a full disk into a message that names the file, or else the folder, and says what to do.

    Raises:
        OSError: with that message.
    """
    try:
        yield
    except OSError as error:
        if not is_full_disk(error):
            raise
        raise OSError(f"{error.filename or folder}: {error.strerror}; {advice}") from error


def write_atomic(path: Path, content: bytes, keep: int = 1) -> None:
    """Write a file beside the target, flush and rename it: readers see the old content or the new, never a mixture.

    Args:
        path: the file to write.
        content: its bytes.
        keep: number of versions to keep: `path`, and earlier ones as `older(path, 1)` and so on.

    Raises:
        OSError: the file cannot be written; the error always names `path`.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        for age in range(keep - 1, 0, -1):
            if older(path, age - 1).exists():
                older(path, age - 1).replace(older(path, age))
        temporary.replace(path)
    except OSError as error:
        error.filename = str(path)  # the error of a full disk names no file, and users do not know the temporary one
        raise
    finally:
        with contextlib.suppress(OSError):  # a read-only disk does not allow it
            temporary.unlink(missing_ok=True)
    flush_folder(path.parent)


@contextlib.contextmanager
def write_beside(path: Path) -> Iterator[Path]:
    """Yield a new file's path beside `path`; rename it to `path` at the end of the block, or delete it on an error.

    Raises:
        FileNotFoundError: the folder of the file does not exist.
        OSError: the file cannot be written; the error always names `path`.
    """
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path.parent}: no such folder; make it, or write elsewhere")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        if error.filename == str(temporary) or is_full_disk(error):
            error.filename = str(path)
        raise
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
    flush_folder(path.parent)


def flush_folder(folder: Path) -> None:
    """Make renames inside `folder` survive a crash of the system."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_json(path: Path, value: Any) -> None:
    """Write a value as an indented JSON file, atomically."""
    write_atomic(path, (json.dumps(value, indent=2) + "\n").encode())


@contextlib.contextmanager
def hold_lock(path: Path, on_busy: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Hold a lock on the file `path` within the block; the system releases it when the process ends for any reason.

    If another process holds the lock, call `on_busy`, which may raise an error, then wait for the lock.
    """
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            on_busy()
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def lock_folder(folder: Path) -> contextlib.AbstractContextManager[None]:
    """Hold the lock of a run folder, so that no other process writes to it.

    Raises:
        FileExistsError: another process writes to it.
    """

    def refuse() -> None:
        raise FileExistsError(
            f"{folder}: another process is training in this folder; wait for it, or give --out for another folder"
        ) from None

    return hold_lock(folder / ".lock", refuse)


def check_free_space(folder: Path, needed: int) -> None:
    """Raise an error if a run's checkpoints do not fit on the disk of its folder.

    Raises:
        OSError: fewer than `needed` bytes are free.
    """
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise OSError(
            f"{folder}: {free / 1e6:,.1f} MB free on this disk, a run's checkpoints need {needed / 1e6:,.1f} MB; "
            "make room, or give --out for a folder on another disk"
        )
