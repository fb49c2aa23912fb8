"""ASL-DVS: LETTER/*.mat in the zip archives Yin*.zip or in folders, or .npz as SpikingJelly keeps them.

There is no official split: data.test_share of each class is drawn by data.split_seed for the test. The files count rows
from below, as jAER does, so the recipe turns them with data.flip_y.

Source: Bi et al., "Graph-based object classification for neuromorphic vision sensing", ICCV 2019.
"""

from pathlib import Path

from multifire.config import DataConfig
from multifire.datasets.classes import natural
from multifire.datasets.recordings import Source, absent, chunked, divided, fingerprint, list_recordings
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
    found.sort(key=lambda item: natural(item.name))
    items = [(item, ASL_NAMES.index(item.folder)) for item in found]
    if {label for _, label in items} != set(range(len(ASL_NAMES))):
        raise absent("asl-dvs", location, f"{ARCHIVES}, or a folder of *.mat for each letter but j and z")
    recordings = divided(items, ASL_NAMES, cfg, location)
    names = (f"{item.name} {item.size}" for item in found)
    return Source(files, len(recordings), fingerprint(files, names), chunked(recordings, CHUNK))
