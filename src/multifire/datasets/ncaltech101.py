"""N-Caltech101: CLASS/image_NUMBER.bin in Caltech101.zip or in folders, or .npz as SpikingJelly keeps them.

There is no official split: data.test_share of each class is drawn by data.split_seed for the test.

Source: Orchard et al., "Converting static image datasets to spiking neuromorphic datasets using saccades", 2015.
"""

from pathlib import Path

from multifire.config import DataConfig
from multifire.datasets.classes import natural
from multifire.datasets.recordings import Source, absent, chunked, divided, fingerprint, list_recordings
from multifire.datasets.registry import NCALTECH101_NAMES

ARCHIVE = "Caltech101.zip"
SENSOR = (180, 240)
PATTERN = rf"(?:{'|'.join(NCALTECH101_NAMES)})/image_\d+\.(?:bin|npz)"
MAX_RECORDING_BYTES = 64 << 20
"""Maximum bytes of a recording; a real one has about 600,000."""
CHUNK = 32


def find(location: Path, cfg: DataConfig) -> Source:
    """Find the recordings in `location`: a zip archive, the folder with it, or a folder of folders of classes.

    Raises:
        FileNotFoundError: a class is missing.
        ValueError: a damaged archive.
    """
    if (location / ARCHIVE).is_file():
        location = location / ARCHIVE
    found = list_recordings(location, PATTERN, MAX_RECORDING_BYTES, SENSOR)
    found.sort(key=lambda item: natural(item.name))
    items = [(item, NCALTECH101_NAMES.index(item.folder)) for item in found]
    if {label for _, label in items} != set(range(len(NCALTECH101_NAMES))):
        expected = f"{ARCHIVE}, or folders of its {len(NCALTECH101_NAMES)} classes with image_*.bin"
        raise absent("ncaltech101", location, expected)
    recordings = divided(items, NCALTECH101_NAMES, cfg, location)
    names = (f"{item.name} {item.size}" for item in found)
    return Source((location,), len(recordings), fingerprint((location,), names), chunked(recordings, CHUNK))
