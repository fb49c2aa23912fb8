"""Small event data sets of random events, in the file layouts that their authors publish."""

import importlib.util
import struct
import zipfile
from pathlib import Path

import numpy as np

from multifire.datasets.registry import CIFAR10_NAMES

_TOOL = Path(__file__).parents[2] / "tools" / "make_gesture_archive.py"
_spec = importlib.util.spec_from_file_location("make_gesture_archive", _TOOL)
gesture = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(gesture)

RECORDINGS = [(1, "lab"), (2, "led"), (23, "lab"), (24, "led"), (29, "natural")]
"""User and light: three training recordings and two test recordings."""


def gesture_archive(folder: Path, recordings: list[tuple[int, str]] = RECORDINGS) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    gesture.write_archive(folder / "DvsGesture.tar.gz", recordings)
    return folder / "DvsGesture.tar.gz"


def nmnist_record(rng: np.random.Generator, events: int = 40) -> bytes:
    """Return a recording of random events; each has 40 bits: x, y, polarity and 23 bits of time in µs."""
    t = np.sort(rng.integers(0, 300_000, events))
    x, y, p = rng.integers(0, 34, events), rng.integers(0, 34, events), rng.integers(0, 2, events)
    columns = [x, y, p << 7 | t >> 16, t >> 8 & 255, t & 255]
    return np.stack(columns, 1).astype(np.uint8).tobytes()


def nmnist_zip(path: Path, train: int = 12, test: int = 4, classes: int = 10) -> Path:
    rng = np.random.default_rng(0)
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for split, count in (("Train", train), ("Test", test)):
            for number in range(count):
                file.writestr(f"{split}/{number % classes}/{number + 1:05}.bin", nmnist_record(rng))
    return path


def aedat2(rng: np.random.Generator, events: int = 30) -> bytes:
    t = np.sort(rng.integers(1000, 100_000, events))
    address = rng.integers(0, 1 << 15, events)
    return b"#!AER-DAT2.0\r\n# made for a test\r\n" + b"".join(
        struct.pack(">II", a, stamp) for a, stamp in zip(address.tolist(), t.tolist(), strict=True)
    )


def cifar10_dvs(folder: Path, count: int = 10) -> Path:
    """Write ten zip archives with members out of order; numbers from 5 on sort differently as numbers and as names."""
    rng = np.random.default_rng(1)
    folder.mkdir(parents=True, exist_ok=True)
    for kind in CIFAR10_NAMES:
        with zipfile.ZipFile(folder / f"{kind}.zip", "w", zipfile.ZIP_DEFLATED) as file:
            for number in rng.permutation(np.arange(5, 5 + count)).tolist():
                file.writestr(f"{kind}/cifar10_{kind}_{number}.aedat", aedat2(rng))
    return folder
