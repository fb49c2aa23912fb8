"""Where a run runs: device, precision, seeds, signals, log, and files that are never half written."""

import contextlib
import json
import logging
import os
import platform
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

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


def write_atomic(path: Path, content: bytes) -> None:
    """Write beside the target, flush, rename: a reader sees the old file or the new one, never a torn one."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with beside.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    finally:
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


class StopRequest:
    """True once Ctrl-C was pressed; a second Ctrl-C stops at once."""

    def __init__(self):
        self.requested = False

    def __bool__(self) -> bool:
        return self.requested

    def _on_signal(self, number: int, frame: object) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        log.warning("stopping after this step; press Ctrl-C again to stop at once")


@contextlib.contextmanager
def stop_on_interrupt() -> Iterator[StopRequest]:
    """Turn SIGINT into a request that the training loop looks at between two steps."""
    stop = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield stop  # only the main thread may set a signal handler
        return
    before = signal.signal(signal.SIGINT, stop._on_signal)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)


def describe_machine(device: "torch.device") -> dict[str, Any]:
    """Processor, threads, device and versions: what a figure means nothing without."""
    import numpy as np
    import torch

    from multifire import __version__

    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "multifire": __version__,
    }


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
