"""DVS-Lip: train/WORD/NUMBER.npy and test/WORD/NUMBER.npy, in DVS-Lip.zip or in folders.

The test shows other speakers than the training.

Source: Tan et al., "Multi-grained spatio-temporal features perceived network for event-based lip-reading", CVPR 2022.
"""

from pathlib import Path

from multifire.config import DataConfig
from multifire.datasets.classes import natural
from multifire.datasets.recordings import TEST, TRAIN, Sample, Source, absent, list_recordings, source_of
from multifire.datasets.registry import DVS_LIP_NAMES

ARCHIVE = "DVS-Lip.zip"
SENSOR = (128, 128)
PATTERN = rf"(?:train|test)/(?:{'|'.join(DVS_LIP_NAMES)})/\w+\.np[yz]"
MAX_RECORDING_BYTES = 64 << 20
CHUNK = 32


def find(location: Path, cfg: DataConfig) -> Source:
    """Find the recordings in `location`: a zip archive, the folder with it, or a folder with train and test.

    Raises:
        FileNotFoundError: no recordings of a split.
        ValueError: a damaged archive.
    """
    if (location / ARCHIVE).is_file():
        location = location / ARCHIVE
    found = list_recordings(location, PATTERN, MAX_RECORDING_BYTES, SENSOR)
    found.sort(key=lambda item: natural(item.name))
    recordings = []
    for item in found:
        split, word, file = item.name.split("/")[-3:]
        recordings.append((item.opener, Sample(f"{split}/{word}/{file}", DVS_LIP_NAMES.index(word), split)))
    if {sample.split for _, sample in recordings} != {TRAIN, TEST}:
        raise absent("dvs-lip", location, f"{ARCHIVE}, or folders train/WORD/*.npy and test/WORD/*.npy")
    return source_of((location,), found, recordings, CHUNK)
