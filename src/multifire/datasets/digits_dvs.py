"""Simulated event-camera recordings of the embedded digits, moved along three saccades."""

import functools
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from multifire.config import DataConfig
from multifire.datasets.images import read_digits
from multifire.datasets.recordings import TEST, TRAIN, Sample, Source, chunked
from multifire.events import Recording, Stray
from multifire.events.recording import pack
from multifire.events.simulate import SaccadeOptions, simulate_events

CHUNK = 128
SEEDS = {TRAIN: 0, TEST: 1}
"""Seeds of thresholds and noise; fixed, so that the events are the same everywhere."""


@dataclass(frozen=True)
class Digit:
    """An embedded digit; its events are simulated when it is opened."""

    split: str
    index: int

    def open(self, stray: Stray = "refuse") -> Recording:
        events = _simulated(self.split, self.index // CHUNK)[self.index % CHUNK]
        t, x, y, p = (events[name].astype(np.int64) for name in ("t", "x", "y", "p"))
        name, size = f"simulated {self.split} digit {self.index}", SaccadeOptions().sensor_size
        return Recording(name, "simulated", size, iter((pack(name, size, 0, t, x, y, p),)))


def find(location: Path, cfg: DataConfig) -> Source:
    """Return all embedded digits; `location` is not read."""
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
    """Return the events of a chunk of digits: a chunk is simulated much faster than one digit after the other."""
    first = chunk * CHUNK
    return list(simulate_events(_digits(split)[0][first : first + CHUNK, 0], None, SEEDS[split], first))
