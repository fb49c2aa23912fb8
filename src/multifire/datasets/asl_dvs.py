"""ASL-DVS: LETTER/*.mat in the zip archives Yin*.zip or in folders, or .npz as SpikingJelly keeps them.

There is no official split: data.test_share of each class is drawn by data.split_seed for the test. The files count rows
from below, as jAER does, so the recipe turns them with data.flip_y.

Source: Bi et al., "Graph-based object classification for neuromorphic vision sensing", ICCV 2019.
"""

from pathlib import Path

from multifire.config import DataConfig
from multifire.datasets.recordings import Source, list_recordings, source_by_folder
from multifire.datasets.registry import ASL_NAMES

ARCHIVES = "Yin*.zip"
SENSOR = (180, 240)
PATTERN = rf"[{''.join(ASL_NAMES)}]/\w+\.(?:mat|npz)"
MAX_RECORDING_BYTES = 64 << 20
"""Maximum bytes of a recording; a real one has about 300,000."""
CHUNK = 64


def find(location: Path, cfg: DataConfig) -> Source:
    """Find the recordings in `location`: a zip archive, a folder of zip archives, or a folder of folders of letters.

    Raises:
        FileNotFoundError: a letter is missing.
        ValueError: a damaged archive.
    """
    files = (location,)
    if location.is_dir() and (zips := sorted(location.glob(ARCHIVES))):
        files = tuple(zips)
    found = [item for file in files for item in list_recordings(file, PATTERN, MAX_RECORDING_BYTES, SENSOR)]
    expected = f"{ARCHIVES}, or a folder of *.mat for each letter but j and z"
    return source_by_folder(files, found, cfg, location, expected, CHUNK)
