"""N-MNIST: Train/LABEL/ID.bin and Test/LABEL/ID.bin, in folders, in Train.zip and Test.zip, or in one zip archive.

Source: Orchard et al., "Converting static image datasets to spiking neuromorphic datasets using saccades", 2015.
"""

import re
from pathlib import Path

from multifire.config import DataConfig
from multifire.datasets.recordings import TEST, TRAIN, Sample, Source, absent, list_recordings, source_of

PATTERN = r"(?:Train|Test)/\d/\w+\.bin"
MAX_RECORDING_BYTES = 16 << 20
"""Maximum bytes of a recording; a real one has about 25,000."""
CHUNK = 64


def find(location: Path, cfg: DataConfig) -> Source:
    """Find the recordings in `location`, a folder or a zip archive.

    Raises:
        FileNotFoundError: no recordings of a split.
        ValueError: a damaged archive.
    """
    files = (location,)
    if location.is_dir() and not (location / "Train").is_dir():
        files = tuple(sorted(location.glob("*.zip")))
    found = [item for path in files for item in list_recordings(path, PATTERN, MAX_RECORDING_BYTES)]
    found.sort(key=lambda item: item.name)
    recordings = []
    for item in found:
        split, label, stem = re.split(r"[/.]", item.name)[-4:-1]
        recordings.append((item.opener, Sample(f"{split}/{label}/{stem}", int(label), split.lower())))
    if {sample.split for _, sample in recordings} != {TRAIN, TEST}:
        raise absent("nmnist", location, "Train.zip and Test.zip, or folders Train/LABEL/*.bin and Test/LABEL/*.bin")
    return source_of(files, found, recordings, CHUNK)
