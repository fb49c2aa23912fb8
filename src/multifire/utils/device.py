"""The device that a run computes on, and a description of the machine."""

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
        ValueError: unknown device, or not present on this machine.
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
    """Run convolutions in bf16 if `precision` is "bf16"; do nothing for "fp32"."""
    import torch

    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16")


def describe_machine(device: "torch.device") -> dict[str, Any]:
    """Return the processor, threads, device and versions that a measured figure depends on."""
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
    """Return the processor's name."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
