"""CIFAR10-DVS: cifar10_CLASS_NUMBER.aedat in ten zip archives, airplane.zip to truck.zip, or in ten folders.

Source: Li et al., "CIFAR10-DVS: an event-stream dataset for object classification", 2017.
"""

import re
from pathlib import Path

from multifire.config import DataConfig
from multifire.datasets.recordings import (
    TEST,
    TRAIN,
    Found,
    Sample,
    Source,
    absent,
    chunked,
    fingerprint,
    list_recordings,
)
from multifire.datasets.registry import CIFAR10_NAMES

MAX_RECORDING_BYTES = 256 << 20
"""Maximum bytes of a recording; a real one has about 1.6 million."""
TRAIN_SHARE = 0.9
CHUNK = 50


def find(location: Path, cfg: DataConfig) -> Source:
    """Find the recordings in the folder `location`; 90 % of each class are for training.

    These are the first by the number in their names, as the paper describes (its scripts use the order in which the
    file system lists a folder), or those drawn by cfg.split_seed.

    Raises:
        FileNotFoundError: a class is missing.
        ValueError: a damaged archive.
    """
    files, names, recordings = [], [], []
    for label, kind in enumerate(CIFAR10_NAMES):
        home = location / f"{kind}.zip" if (location / f"{kind}.zip").is_file() else location / kind
        found = list_recordings(home, rf"cifar10_{kind}_\d+\.aedat", MAX_RECORDING_BYTES) if home.exists() else []
        if not found:
            raise absent(
                "cifar10-dvs", location, f"{kind}.zip (one for each class), or a folder {kind} of .aedat files"
            )
        found.sort(key=_number)
        held = _held_out(len(found), label, cfg.split_seed)
        for position, item in enumerate(found):
            split = TEST if position in held else TRAIN
            recordings.append((item.opener, Sample(f"{kind}/{_number(item)}", label, split)))
        files.append(home)
        names += [f"{item.name} {item.size}" for item in found]
    return Source(tuple(files), len(recordings), fingerprint(files, names), chunked(recordings, CHUNK))


def _number(item: Found) -> int:
    return int(re.findall(r"\d+", item.name)[-1])


def _held_out(count: int, label: int, seed: int | None) -> set[int]:
    """Return the positions of a class's test recordings among its `count`."""
    order = list(range(count))
    if seed is not None:
        import numpy as np

        order = np.random.default_rng([seed, label]).permutation(count).tolist()
    return set(order[round(TRAIN_SHARE * count) :])
