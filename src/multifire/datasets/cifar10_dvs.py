"""CIFAR10-DVS: cifar10_CLASS_NUMBER.aedat in ten zip archives, airplane.zip to truck.zip, or in ten folders.

Also as AEDAT4 in ten folders, as tonic's copy has it, and as SpikingJelly keeps it, in events_np/CLASS/*.npz, where
rows are columns and polarities are swapped: such events are turned back, so that frames are those of the originals.

Source: Li et al., "CIFAR10-DVS: an event-stream dataset for object classification", 2017.
"""

import re
from dataclasses import dataclass, replace
from pathlib import Path

from multifire.config import DataConfig
from multifire.datasets.recordings import (
    TEST,
    TRAIN,
    Found,
    InFile,
    InZip,
    Opener,
    Sample,
    Source,
    absent,
    list_recordings,
    source_of,
)
from multifire.datasets.registry import CIFAR10_NAMES
from multifire.events import Recording, Stray
from multifire.events.recording import Packed

MAX_RECORDING_BYTES = 256 << 20
"""Maximum bytes of a recording; a real one has about 1.6 million."""
TRAIN_SHARE = 0.9
SENSOR = (128, 128)
CACHED = "events_np"
CHUNK = 50


def find(location: Path, cfg: DataConfig) -> Source:
    """Find the recordings in the folder `location`; 90 % of each class are for training.

    These are the first by the number in their names, as the paper describes (its scripts use the order in which the
    file system lists a folder), or those drawn by cfg.split_seed.

    Raises:
        FileNotFoundError: a class is missing.
        ValueError: a damaged archive.
    """
    files, all_found, recordings = [], [], []
    location = location / CACHED if (location / CACHED).is_dir() else location
    for label, kind in enumerate(CIFAR10_NAMES):
        home = location / f"{kind}.zip" if (location / f"{kind}.zip").is_file() else location / kind
        pattern = rf"cifar10_{kind}_\d+\.(?:aedat4?|npz)"
        found = list_recordings(home, pattern, MAX_RECORDING_BYTES) if home.exists() else []
        if not found:
            expected = f"{kind}.zip (one for each class), or a folder {kind} of .aedat, .aedat4 or .npz files"
            raise absent("cifar10-dvs", location, expected)
        found.sort(key=_number)
        held = _held_out(len(found), label, cfg.split_seed)
        for position, item in enumerate(found):
            split = TEST if position in held else TRAIN
            opener = Turned(item.opener) if item.name.endswith(".npz") else item.opener
            recordings.append((opener, Sample(f"{kind}/{_number(item)}", label, split)))
        files.append(home)
        all_found += found
    return source_of(files, all_found, recordings, CHUNK)


@dataclass(frozen=True)
class Turned:
    """A file of SpikingJelly: x is 127 − row, y the column, p 1 − polarity. One that states its size is not turned."""

    opener: Opener

    def open(self, stray: Stray = "refuse") -> Recording:
        recording = self.opener.open(stray)
        if recording.sensor_size is not None:
            return recording
        recording.close()
        assert isinstance(self.opener, (InFile, InZip))
        recording = replace(self.opener, sensor_size=SENSOR).open(stray)
        packed = (_turned(chunk) for chunk in recording.packed())
        return Recording(recording.name, recording.format, SENSOR, packed, recording)


def _turned(chunk: Packed) -> Packed:
    position, size = chunk.pixel >> 1, SENSOR[0]
    row, column = size - 1 - position % size, position // size
    return Packed(chunk.t, (row * size + column) * 2 + 1 - (chunk.pixel & 1))


def _number(item: Found) -> int:
    return int(re.findall(r"\d+", item.name)[-1])


def _held_out(count: int, label: int, seed: int | None) -> set[int]:
    """Return the positions of a class's test recordings among its `count`."""
    order = list(range(count))
    if seed is not None:
        import numpy as np

        order = np.random.default_rng([seed, label]).permutation(count).tolist()
    return set(order[round(TRAIN_SHARE * count) :])
