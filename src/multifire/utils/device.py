"""Choose the device, and describe the machine."""

import contextlib
import os
import platform
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def pick_device(name: str) -> "torch.device":
    """Return the device called `name`; "auto" is the GPU if there is one, else the CPU.

    Raises:
        ValueError: the device is unknown, or this machine does not have it.
    """
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"unknown device {name!r}, expected auto, cpu, cuda or cuda:N") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device {name} is missing: torch finds {torch.cuda.device_count()} GPUs; give --device cpu")
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device {name!r} is not supported, expected auto, cpu, cuda or cuda:N")
    return device


def autocast(device: "torch.device", precision: str) -> contextlib.AbstractContextManager:
    """Return a context in which convolutions run in bf16 if `precision` is "bf16"; for "fp32" it does nothing."""
    import torch

    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16")


def describe_machine(device: "torch.device") -> dict[str, Any]:
    """Return the processor, threads, device and versions, on which measured figures depend."""
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


def processor() -> str:
    """Return the name of the processor."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
