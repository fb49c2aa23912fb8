"""Make a synthetic DvsGesture.tar.gz with the same files and label CSVs as the published archive, but few events.

    python tools/make_gesture_archive.py DEST

The archive has 122 recordings of 29 users with 1,464 gestures; 1,176 of them belong to the training users. The AEDAT
3.1 files also hold packets of another type and invalid events. Each gesture is a moving cloud of events; its path
depends on the class.
"""

import argparse
import gzip
import io
import struct
import tarfile
from pathlib import Path

import numpy as np

LIGHTS = ("fluorescent", "fluorescent_led", "lab", "led", "natural")
MISSING_LIGHTS = {
    1: 1, 5: 1, 8: 1, 9: 1, 11: 1, 13: 1, 15: 1, 17: 1, 19: 1, 20: 1, 21: 1, 22: 1, 2: 1, 3: 1, 4: 1, 6: 1, 7: 1,
    24: 1, 25: 1, 26: 1, 27: 1, 28: 1, 29: 1,
}  # fmt: skip
"""Number of lights that are missing for a user; 98 training and 24 test recordings remain, as in the published data."""
GESTURES = (1, 2, 3, 4, 5, 6, 7, 8, 8, 9, 10, 11)
"""Classes of the gestures in each recording, in order."""
EVENTS = 60
"""Events of each gesture."""
GESTURE_US, PAUSE_US = 1_500_000, 200_000


def recordings() -> list[tuple[int, str]]:
    """Return the user and the light of every recording."""
    return [(user, light) for user in range(1, 30) for light in LIGHTS[: len(LIGHTS) - MISSING_LIGHTS.get(user, 0)]]


def make_recording(user: int, light: str) -> tuple[bytes, bytes]:
    """Return the AEDAT 3.1 file and the label CSV of one recording."""
    rng = np.random.default_rng([user, LIGHTS.index(light)])
    header = b"#!AER-DAT3.1\r\n#Format: RAW\r\n#Source 1: DVS128\r\n#Start-Time: 2026-01-01\r\n#!END-HEADER\r\n"
    packets, rows = [header], ["class,startTime_usec,endTime_usec"]
    start = 80_000 + 1000 * user
    for label in GESTURES:
        packets += [_special_packet(start), _polarity_packet(rng, label, start)]
        rows.append(f"{label},{start},{start + GESTURE_US}")
        start += GESTURE_US + PAUSE_US
    return b"".join(packets), ("\n".join(rows) + "\n").encode()


def _polarity_packet(rng: np.random.Generator, label: int, start: int) -> bytes:
    """Return a packet with the events of a gesture of class `label` that begins at `start` µs."""
    t = np.sort(start + rng.integers(0, GESTURE_US, EVENTS))
    angle = 2 * np.pi * label / 11 + (t - start) / 200_000
    x = np.clip(64 + 40 * np.cos(angle) + rng.normal(0, 3, EVENTS), 0, 127).astype(np.uint32)
    y = np.clip(64 + 40 * np.sin(angle) + rng.normal(0, 3, EVENTS), 0, 127).astype(np.uint32)
    valid = rng.random(EVENTS) > 0.02
    data = x << 17 | y << 2 | rng.integers(0, 2, EVENTS, dtype=np.uint32) << 1 | valid
    events = np.stack([data, t.astype(np.uint32)], 1).astype("<u4")
    return struct.pack("<HHIIIIII", 1, 1, 8, 4, 0, EVENTS, EVENTS, int(valid.sum())) + events.tobytes()


def _special_packet(start: int) -> bytes:
    """Return a packet with one special event, which readers must skip."""
    return struct.pack("<HHIIIIII", 0, 1, 8, 4, 0, 1, 1, 1) + struct.pack("<II", 1, start)


def write_archive(path: Path, made: list[tuple[int, str]]) -> None:
    """Write an archive of the recordings with these users and lights; the same recordings give the same bytes."""
    with (
        path.open("wb") as file,
        gzip.GzipFile(fileobj=file, mode="wb", mtime=0) as compressed,
        tarfile.open(fileobj=compressed, mode="w", format=tarfile.USTAR_FORMAT) as tar,
    ):
        for user, light in made:
            stem = f"DvsGesture/user{user:02}_{light}"
            recording, labels = make_recording(user, light)
            add(tar, f"{stem}.aedat", recording)
            add(tar, f"{stem}_labels.csv", labels)
        for name, is_test in (("trials_to_train.txt", False), ("trials_to_test.txt", True)):
            lines = [f"user{user:02}_{light}.aedat\n" for user, light in made if (user > 23) == is_test]
            add(tar, f"DvsGesture/{name}", "".join(lines).encode())


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    """Add a file to the archive."""
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dest", type=Path, help="folder for DvsGesture.tar.gz")
    args = parser.parse_args()
    args.dest.mkdir(parents=True, exist_ok=True)
    archive, made = args.dest / "DvsGesture.tar.gz", recordings()
    write_archive(archive, made)
    print(f"{archive}: {len(made)} recordings, {len(GESTURES) * len(made):,} gestures")


if __name__ == "__main__":
    main()
