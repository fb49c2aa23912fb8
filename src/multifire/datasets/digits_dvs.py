"""Simulated: the embedded digits as an event camera would see them, moved along three saccades."""

import functools
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from multifire.config import DataConfig
from multifire.datasets.images import read_digits
from multifire.datasets.recordings import TEST, TRAIN, Sample, Source, chunked
from multifire.events import Recording
from multifire.events.recording import pack
from multifire.events.simulate import SaccadeOptions, simulate_events

CHUNK = 128
SEEDS = {TRAIN: 0, TEST: 1}
"""Of thresholds and noise; fixed, so that everyone has the same events."""


@dataclass(frozen=True)
class Digit:
    """An embedded digit, whose events are simulated when it is opened."""

    split: str
    index: int

    def open(self) -> Recording:
        events = _simulated(self.split, self.index // CHUNK)[self.index % CHUNK]
        t, x, y, p = (events[name].astype(np.int64) for name in ("t", "x", "y", "p"))
        name, size = f"simulated {self.split} digit {self.index}", SaccadeOptions().sensor_size
        return Recording(name, "simulated", size, iter((pack(name, size, 0, t, x, y, p),)))


def find(place: Path, cfg: DataConfig) -> Source:
    """All embedded digits; nothing is read from `place`."""
    recordings = [
        (Digit(split, index), Sample(f"{split}/{index}", label, split))
        for split in (TRAIN, TEST)
        for index, label in enumerate(_digits(split)[1].tolist())
    ]
    source = "simulated from the embedded digits"
    return Source((Path("embedded digits"),), len(recordings), source, chunked(recordings, CHUNK))


def _digits(split: str) -> tuple[np.ndarray, np.ndarray]:
    return read_digits()[split == TEST]


@functools.lru_cache(maxsize=2)
def _simulated(split: str, chunk: int) -> list[np.ndarray]:
    """The events of a chunk's digits: many at a time are simulated much faster than one by one."""
    first = chunk * CHUNK
    return list(simulate_events(_digits(split)[0][first : first + CHUNK, 0], None, SEEDS[split], first))
