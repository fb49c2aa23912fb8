"""Where a run runs: device, precision, seeds, signals, log, and files that are never half written."""

import contextlib
import ctypes
import errno
import fcntl
import json
import logging
import os
import platform
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    import torch

log = logging.getLogger("multifire")


def pick_device(name: str) -> "torch.device":
    """The device called `name`; "auto" is the GPU where there is one.

    Raises:
        ValueError: no such device, or it is not on this machine.
    """
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"unknown device {name!r}, expected auto, cpu, cuda or cuda:N") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device {name} is not here: torch sees {torch.cuda.device_count()} GPUs; use --device cpu")
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device {name!r} is not supported, expected auto, cpu, cuda or cuda:N")
    return device


def autocast(device: "torch.device", precision: str) -> contextlib.AbstractContextManager:
    """Convolutions in bf16 where `precision` is "bf16"; nothing where it is "fp32"."""
    import torch

    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16")


def older(path: Path, age: int) -> Path:
    """Where `write_atomic` keeps the file that was `path` so many writes ago."""
    return path.with_suffix(f".{age}{path.suffix}") if age else path


def write_atomic(path: Path, content: bytes, keep: int = 1) -> None:
    """Write beside the target, flush, rename: a reader sees the old file or the new one, never a torn one.

    `keep` is how many versions are there afterwards: `path`, and the ones before it as `older(path, 1)` and so on.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with beside.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        for age in range(keep - 1, 0, -1):
            if older(path, age - 1).exists():
                older(path, age - 1).replace(older(path, age))
        beside.replace(path)
    except OSError as error:
        error.filename = str(path)  # a write that finds no room names no file, and nobody knows the one beside
        raise
    finally:
        with contextlib.suppress(OSError):  # a disk that has become read-only refuses this too
            beside.unlink(missing_ok=True)
    flush_folder(path.parent)


def flush_folder(folder: Path) -> None:
    """Make renames inside `folder` durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_json(path: Path, value: Any) -> None:
    write_atomic(path, (json.dumps(value, indent=2) + "\n").encode())


class Signals:
    """What signals have asked for: to `stop` (the signal's number; 0: not yet), to `save` a checkpoint and go on."""

    def __init__(self):
        self.stop = 0
        self.save = False

    def _on_stop(self, number: int, frame: object) -> None:
        if self.stop:
            raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)
        self.stop = number
        log.warning("stopping after this step; once more to stop at once, without a checkpoint")

    def _on_save(self, number: int, frame: object) -> None:
        self.save = True


@contextlib.contextmanager
def listening() -> Iterator[Signals]:
    """Turn SIGINT and SIGTERM, and SIGUSR1, into requests that the training loop looks at between two steps."""
    asked = Signals()
    if threading.current_thread() is not threading.main_thread():
        yield asked  # only the main thread may set a signal handler
        return
    handlers = {signal.SIGINT: asked._on_stop, signal.SIGTERM: asked._on_stop, signal.SIGUSR1: asked._on_save}
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Watchdog:
    """Says so where no step is finished for a while: `with Watchdog(limit_s) as dog: dog.stepped("step 12")`."""

    def __init__(self, limit_s: float = 300.0):
        self._limit_s, self._last, self._since = limit_s, "the start", time.monotonic()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._thread.join()

    def stepped(self, what: str) -> None:
        self._last, self._since = what, time.monotonic()

    def _watch(self) -> None:
        told = 1
        while not self._over.wait(min(1.0, self._limit_s / 4)):
            waited = time.monotonic() - self._since
            if waited < self._limit_s:
                told = 1
            elif waited >= told * self._limit_s:
                told += 1
                log.warning("nothing finished for %.0f s, since %s; still waiting", waited, self._last)


def ran_out(error: Exception) -> bool:
    """Whether an error means that there is no more memory: torch and its libraries say so in several ways."""
    import torch

    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(sign in str(error) for sign in OUT_OF_MEMORY)


OUT_OF_MEMORY = ("allocate memory", "could not create a primitive", "could not create a memory object")
"""How torch's allocator and oneDNN say so."""


@contextlib.contextmanager
def full_disk_explained(folder: Path) -> Iterator[None]:
    """Where the disk is full, say what of the run in `folder` is left, and how it goes on."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise OSError(
            f"{error.filename or folder}: {error.strerror}; make room, and --resume goes on from the newest checkpoint"
        ) from None


@contextlib.contextmanager
def holding(path: Path, on_busy: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Hold the lock file `path` alone; the system lets go of it when its holder ends, however that ends.

    Where another process holds it, `on_busy` is called, which may raise, and then it is waited for.
    """
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            on_busy()
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def locked(folder: Path) -> contextlib.AbstractContextManager[None]:
    """Be the only process that writes to this folder.

    Raises:
        FileExistsError: another process holds it.
    """

    def refuse() -> None:
        raise FileExistsError(
            f"{folder}: another process is training in this folder; wait for it, or give --out for another folder"
        ) from None

    return holding(folder / ".lock", refuse)


def check_room(folder: Path, needed: int) -> None:
    """Refuse to begin what the disk cannot hold.

    Raises:
        OSError: fewer than `needed` bytes are free.
    """
    free = shutil.disk_usage(next(place for place in (folder, *folder.absolute().parents) if place.exists())).free
    if free < needed:
        raise OSError(
            f"{folder}: {free / 1e6:,.1f} MB free on this disk, a run's checkpoints need {needed / 1e6:,.1f} MB; "
            "make room, or give --out for a folder on another disk"
        )


def describe_machine(device: "torch.device") -> dict[str, Any]:
    """Processor, threads, device and versions: what a figure means nothing without."""
    import numpy as np
    import torch

    from multifire import __version__

    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "multifire": __version__,
    }


def peak_resident() -> int:
    """VmHWM of this process in bytes: unlike ru_maxrss it does not start from the parent's peak."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) * 1024


_first_step_waits = False


def keep_freed_memory(after_first_step: bool = False) -> None:
    """Have malloc keep what tensors free for the next ones, where it is glibc's and the user has not set it up.

    Left alone it gives tensors of some megabytes back to the system and asks for them anew, in every step, and the
    system clears every page: of a training step of dvs-gesture in bf16 that took a fifth (two cores), and as much of
    one of cifar10 with 128 images, whose tensors are above the 32 MiB at which glibc asks the system at the latest.

    With `after_first_step`, training's first step gets each tensor from the system. What stays of that step, the
    convolutions' plans above all, then lies together and not among the places of tensors, where it would leave gaps
    too small for the next: an eighth less memory at cifar10 in bf16.
    """
    global _first_step_waits
    theirs = {"MALLOC_MMAP_THRESHOLD_", "MALLOC_MMAP_MAX_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_"}
    if theirs & os.environ.keys() or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", ""):
        return
    _first_step_waits = after_first_step
    trim_threshold, mmap_threshold, mmap_max = -1, -3, -4  # of malloc.h
    with contextlib.suppress(OSError, AttributeError):
        malloc_option = ctypes.CDLL(None).mallopt
        malloc_option(trim_threshold, -1)  # never
        malloc_option(mmap_threshold, 256 << 10)
        malloc_option(mmap_max, 65536 if after_first_step else 0)  # glibc's own number, or none whatever the size


def step_done() -> None:
    """A step of training is over; the first of those that `keep_freed_memory` waits for."""
    if _first_step_waits:
        keep_freed_memory()


def give_back_memory() -> None:
    """Return what malloc keeps free to the system, where that is glibc's; it keeps more with every change of sizes."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def processor() -> str:
    """The processor's name."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
