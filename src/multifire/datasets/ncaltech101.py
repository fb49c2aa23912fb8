"""N-Caltech101: CLASS/image_NUMBER.bin in Caltech101.zip or in folders, or .npz as SpikingJelly keeps them.

There is no official split: data.test_share of each class is drawn by data.split_seed for the test.

Source: Orchard et al., "Converting static image datasets to spiking neuromorphic datasets using saccades", 2015.
"""

from pathlib import Path

from multifire.config import DataConfig
from multifire.datasets.recordings import Source, list_recordings, source_by_folder
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
    expected = f"{ARCHIVE}, or folders of its {len(NCALTECH101_NAMES)} classes with image_*.bin"
    return source_by_folder((location,), found, cfg, location, expected, CHUNK)
