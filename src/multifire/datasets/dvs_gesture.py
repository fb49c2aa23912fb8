"""DVS128 Gesture: recordings userNN_LIGHT.aedat (or .aedat4), with the gestures of each in userNN_LIGHT_labels.csv.

Also as other libraries keep it, one gesture in a file: SpikingJelly's train/LABEL/userNN_LIGHT_K.npz, and tonic's
ibmGestureTrain/userNN_LIGHT/LABEL.npy, whose times are in milliseconds.

Users 1 to 23 are for training, 24 to 29 for testing, as in trials_to_train.txt and trials_to_test.txt.

Source: Amir et al., "A low power, fully event-based gesture recognition system", CVPR 2017.
"""

import itertools
import re
from collections.abc import Container, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

from multifire.config import DataConfig
from multifire.datasets import archives
from multifire.datasets.classes import natural
from multifire.datasets.recordings import (
    TEST,
    TRAIN,
    Found,
    InFile,
    Job,
    Opener,
    Sample,
    Source,
    absent,
    fingerprint,
    list_recordings,
    source_of,
)
from multifire.datasets.registry import GESTURE_NAMES
from multifire.utils.log import log

ARCHIVE = "DvsGesture.tar.gz"
RECORDING = re.compile(r"(user(\d+)_[a-z_]+)\.aedat4?")
LABELS = re.compile(r"(user\d+_[a-z_]+)_labels\.csv")
SPIKINGJELLY = r"(?:train|test)/(?:\d|10)/user\d+_[a-z_]+_\d+\.npz"
TONIC = r"ibmGesture(?:Train|Test)/user\d+_[a-z_]+/(?:\d|10)\.npy"
CHUNK = 8
HEADER = "class,startTime_usec,endTime_usec"
LAST_TRAINING_USER, LAST_USER = 23, 29
SENSOR = (128, 128)
PUBLISHED_RECORDINGS = 122
MAX_RECORDING_BYTES = 2 << 30
"""Maximum bytes of a recording; a real one has about 50 million."""
MAX_LABELS = 1 << 20
TONIC_UNIT_US = 1000


def find(location: Path, cfg: DataConfig) -> Source:
    """Find the recordings in an archive, in the archive's folder, or in a folder with the unpacked archive.

    Raises:
        FileNotFoundError: no recordings.
    """
    if (location / ARCHIVE).is_file():
        location = location / ARCHIVE
    if location.is_file():
        files = (location,)
        return Source(files, PUBLISHED_RECORDINGS, fingerprint(files), partial(_jobs_of_archive, location))
    paths = sorted(path for path in location.rglob("*.aedat*") if RECORDING.fullmatch(path.name))
    if not paths:
        pattern = f"(?:{SPIKINGJELLY}|{TONIC})"
        if cached := list_recordings(location, pattern, MAX_RECORDING_BYTES, SENSOR):
            return _of_cached(location, cached)
        raise absent(
            "dvs-gesture",
            location,
            f"{ARCHIVE}, the folder that it unpacks to, or a folder in the layout of SpikingJelly or tonic",
        )
    names = [f"{path.name} {path.stat().st_size}" for path in paths]
    return Source((location,), len(paths), fingerprint((), names), partial(_jobs_of_folder, paths))


def _of_cached(location: Path, cached: list[Found]) -> Source:
    """Return the gestures that another library has cut out, each in a file of its own."""
    recordings: list[tuple[Opener, Sample]] = []
    for item in sorted(cached, key=lambda item: natural(item.name)):
        folder, middle, file = item.name.split("/")[-3:]
        split = TRAIN if folder in ("train", "ibmGestureTrain") else TEST
        if file.endswith(".npy"):
            assert isinstance(item.opener, InFile)
            opener, label = replace(item.opener, unit_us=TONIC_UNIT_US), int(file.removesuffix(".npy"))
        else:
            opener, label = item.opener, int(middle)
        recordings.append((opener, Sample(f"{folder}/{middle}/{file}", label, split)))
    if len({sample.split for _, sample in recordings}) < 2:
        raise absent("dvs-gesture", location, "the gestures of the training and of the test")
    return source_of((location,), cached, recordings, CHUNK)


def _jobs_of_folder(paths: list[Path], done: Container[str], spool: Path) -> Iterator[Job]:
    for path in paths:
        if path.stem not in done:
            labels = path.with_name(f"{path.stem}_labels.csv")
            if not labels.is_file():
                raise _no_labels([path.stem], path.parent)
            with labels.open("rb") as file:
                samples = read_labels(archives.read_all(file, MAX_LABELS, str(labels)), path.stem, str(labels))
            yield Job(path.stem, ((InFile(path, SENSOR), samples),))


def _jobs_of_archive(archive: Path, done: Container[str], spool: Path) -> Iterator[Job]:
    """Read the archive in one pass; copy each recording to disk and yield it when its labels are read too."""
    recordings: set[str] = set()
    labels: dict[str, tuple[Sample, ...]] = {}
    for member in archives.tar_members(archive, MAX_RECORDING_BYTES):
        name = member.name.rpartition("/")[2]
        recording, csv = RECORDING.fullmatch(name), LABELS.fullmatch(name)
        match = recording or csv
        if not match:
            continue
        stem = match[1]
        if stem in (recordings if recording else labels):
            raise ValueError(f"{archive}: holds {name} twice; {archives.AGAIN}")
        if recording:
            recordings.add(stem)
            if stem not in done:
                member.copy_to(spool / f"{stem}.aedat")
        else:
            where = f"{archive}: {name}"
            labels[stem] = read_labels(archives.read_all(member, MAX_LABELS, where), stem, where)
        if stem in recordings and stem in labels and stem not in done:
            yield Job(stem, ((InFile(spool / f"{stem}.aedat", SENSOR), labels[stem]),), spool / f"{stem}.aedat")
    if not recordings:
        raise ValueError(f"{archive}: holds no userNN_LIGHT.aedat: not the archive of DVS128 Gesture")
    if recordings - labels.keys():
        raise _no_labels(sorted(recordings - labels.keys()), archive)
    if labels.keys() - recordings:
        log.warning("%s: labels without a recording: %s", archive, ", ".join(sorted(labels.keys() - recordings)))


def _no_labels(stems: list[str], location: Path) -> ValueError:
    first = ", ".join(f"{stem}_labels.csv" for stem in stems[:3])
    return ValueError(
        f"{location}: {len(stems)} recording{'s have' if len(stems) > 1 else ' has'} no label file ({first}); "
        "restore it from the archive; the recordings prepared so far are kept"
    )


def read_labels(content: bytes, stem: str, where: str) -> tuple[Sample, ...]:
    """Return the gestures of a recording, sorted by start; class c of the file, 1 to 11, is label c − 1.

    Unsorted files are sorted, and overlapping gestures share the events in the overlap; both are logged.

    Raises:
        ValueError: no gesture, another header, a field that is no number, an unknown class or an empty window.
    """
    user = int(stem[4:].partition("_")[0])
    if not 1 <= user <= LAST_USER:
        raise ValueError(f"{where}: user {user}, expected 1 to {LAST_USER}")
    lines = content.decode("utf-8-sig", "replace").split("\n")
    rows = [(number, line.strip()) for number, line in enumerate(lines, 1) if line.strip()]
    if not rows or rows[0][1].replace(" ", "") != HEADER:
        raise ValueError(f"{where}: starts with {rows[0][1][:60] if rows else ''!r}, expected {HEADER!r}")
    gestures = [_gesture(line, f"{where}: line {number}") for number, line in rows[1:]]
    if not gestures:
        raise ValueError(f"{where}: holds no gesture, only a header")
    by_start = sorted(gestures, key=lambda gesture: gesture[1:])
    if by_start != gestures:
        log.warning("%s: gestures are not in the order of their start; sorted them", where)
    for before, after in itertools.pairwise(by_start):
        if after[1] < before[2]:
            log.warning("%s: gestures from %s and %s µs on overlap; both keep their events", where, before[1], after[1])
    split = TRAIN if user <= LAST_TRAINING_USER else TEST
    return tuple(
        Sample(f"{stem}/{number:02}", kind - 1, split, start, end) for number, (kind, start, end) in enumerate(by_start)
    )


def _gesture(line: str, where: str) -> tuple[int, int, int]:
    fields = [field.strip() for field in line.split(",")]
    if len(fields) != 3 or not all(re.fullmatch(r"\d{1,15}", field, re.ASCII) for field in fields):
        raise ValueError(f"{where}: is {line[:60]!r}, expected three whole numbers: {HEADER}")
    kind, start, end = map(int, fields)
    if not 1 <= kind <= len(GESTURE_NAMES):
        raise ValueError(f"{where}: class {kind}, expected 1 to {len(GESTURE_NAMES)}")
    if end <= start:
        raise ValueError(f"{where}: ends at {end} µs, which is not after its start at {start} µs")
    return kind, start, end
