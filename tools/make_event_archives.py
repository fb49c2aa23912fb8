#!/usr/bin/env python3
"""Make small synthetic copies of event data sets, in the files and folders of the published ones.

usage: tools/make_event_archives.py DEST

DEST gets a folder for each layout: ncaltech101 (Caltech101.zip), dvs-lip (DVS-Lip.zip), asl-dvs (Yin1.zip, Yin2.zip);
and as other libraries keep data: gesture-spikingjelly, gesture-tonic, cifar10-dvs-spikingjelly and
ncaltech101-spikingjelly. Every class has a few recordings of random events.
"""

import argparse
import io
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np

from multifire.datasets.registry import ASL_NAMES, CIFAR10_NAMES, DVS_LIP_NAMES, NCALTECH101_NAMES

EVENTS = 40


def random_events(
    rng: np.random.Generator, width: int, height: int, duration_us: int = 300_000
) -> dict[str, np.ndarray]:
    """Return columns t, x, y, p of random events in order of time."""
    columns = {"t": np.sort(rng.integers(0, duration_us, EVENTS)), "x": rng.integers(0, width, EVENTS)}
    return columns | {"y": rng.integers(0, height, EVENTS), "p": rng.integers(0, 2, EVENTS)}


def encode_bin(events: dict[str, np.ndarray]) -> bytes:
    """Return events in the 40 bits of N-MNIST and N-Caltech101."""
    t, x, y, p = (events[name] for name in "txyp")
    return np.stack([x, y, p << 7 | t >> 16, t >> 8 & 255, t & 255], 1).astype(np.uint8).tobytes()


def save_npz(path: Path, events: dict[str, np.ndarray]) -> None:
    np.savez(path, t=events["t"], x=events["x"], y=events["y"], p=events["p"])


def encode_npy(array: np.ndarray) -> bytes:
    content = io.BytesIO()
    np.save(content, array)
    return content.getvalue()


def encode_structured(events: dict[str, np.ndarray]) -> bytes:
    """Return events in an NPY file of records, as DVS-Lip has them."""
    records = np.zeros(EVENTS, [("t", "<i8"), ("x", "<i2"), ("y", "<i2"), ("p", "?")])
    for name, column in events.items():
        records[name] = column
    return encode_npy(records)


def encode_mat(arrays: dict[str, np.ndarray], compressed: bool = True) -> bytes:
    """Return columns in a MATLAB file of level 5."""
    elements = []
    for name, array in arrays.items():
        kind, class_ = {"f8": (9, 6), "i4": (5, 12), "u1": (2, 9), "u2": (4, 11)}[array.dtype.str[1:]]
        parts = [
            _element(6, struct.pack("<II", class_, 0)),
            _element(5, struct.pack("<ii", len(array), 1)),
            _element(1, name.encode()),
            _element(kind, array.tobytes()),
        ]
        matrix = _element(14, b"".join(parts))
        packed = zlib.compress(matrix)
        elements.append(struct.pack("<II", 15, len(packed)) + packed if compressed else matrix)
    head = b"MATLAB 5.0 MAT-file, made for a test".ljust(124) + struct.pack("<H", 0x100) + b"IM"
    return head + b"".join(elements)


def _element(kind: int, data: bytes) -> bytes:
    if len(data) <= 4:  # a small element: size and data within eight bytes
        return struct.pack("<HH", kind, len(data)) + data.ljust(4, b"\0")
    return struct.pack("<II", kind, len(data)) + data + bytes(-len(data) % 8)


def make_ncaltech101(folder: Path, count: int = 3, seed: int = 0) -> None:
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    with zipfile.ZipFile(folder / "Caltech101.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for kind in NCALTECH101_NAMES:
            for number in range(1, count + 1):
                archive.writestr(f"Caltech101/{kind}/image_{number:04}.bin", encode_bin(random_events(rng, 233, 173)))


def make_ncaltech101_spikingjelly(folder: Path, count: int = 3, seed: int = 0) -> None:
    """Write the recordings of `make_ncaltech101` as SpikingJelly keeps them."""
    rng = np.random.default_rng(seed)
    for kind in NCALTECH101_NAMES:
        (folder / "events_np" / kind).mkdir(parents=True)
        for number in range(1, count + 1):
            save_npz(folder / "events_np" / kind / f"image_{number:04}.npz", random_events(rng, 233, 173))


def make_dvs_lip(folder: Path, train: int = 2, test: int = 1) -> None:
    rng = np.random.default_rng(1)
    folder.mkdir(parents=True)
    with zipfile.ZipFile(folder / "DVS-Lip.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for split, count in (("train", train), ("test", test)):
            for word in DVS_LIP_NAMES:
                for number in range(count):
                    content = encode_structured(random_events(rng, 128, 128, 1_200_000))
                    archive.writestr(f"DVS-Lip/{split}/{word}/{number}.npy", content)


def make_asl_dvs(folder: Path, count: int = 5) -> None:
    rng = np.random.default_rng(2)
    folder.mkdir(parents=True)
    for person in (1, 2):
        with zipfile.ZipFile(folder / f"Yin{person}.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            for letter in ASL_NAMES:
                for number in range(person, 2 * count + 1, 2):
                    events = random_events(rng, 240, 180, 100_000)
                    arrays = {
                        "ts": events["t"].astype("<f8"),
                        "x": events["x"].astype("<u2"),
                        "y": events["y"].astype("<u2"),
                    }
                    content = encode_mat(arrays | {"pol": events["p"].astype("u1")}, compressed=person == 1)
                    archive.writestr(f"{letter}/{letter}_{number:04}.mat", content)


def make_gesture_spikingjelly(folder: Path) -> None:
    """Write events_np/train/LABEL/userNN_LIGHT_K.npz and test likewise."""
    rng = np.random.default_rng(3)
    for split, user in (("train", 1), ("train", 23), ("test", 24)):
        for label in range(11):
            (folder / "events_np" / split / str(label)).mkdir(parents=True, exist_ok=True)
            for number in range(2 if label == 7 else 1):
                path = folder / "events_np" / split / str(label) / f"user{user:02}_led_{number}.npz"
                save_npz(path, random_events(rng, 128, 128, 1_500_000))


def make_gesture_tonic(folder: Path) -> None:
    """Write ibmGestureTrain/userNN_LIGHT/LABEL.npy and ibmGestureTest likewise: rows of x, y, p and t in ms."""
    rng = np.random.default_rng(4)
    for split, user in (("Train", 1), ("Train", 23), ("Test", 24)):
        place = folder / f"ibmGesture{split}" / f"user{user:02}_led"
        place.mkdir(parents=True)
        for label in range(11):
            events = random_events(rng, 128, 128, 1500)
            np.save(place / f"{label}.npy", np.stack([events[name] for name in "xypt"], 1).astype(np.float32))


def make_cifar10_dvs_spikingjelly(folder: Path, count: int = 10) -> None:
    """Write events_np/CLASS/cifar10_CLASS_N.npz."""
    rng = np.random.default_rng(5)
    for kind in CIFAR10_NAMES:
        (folder / "events_np" / kind).mkdir(parents=True)
        for number in range(count):
            save_npz(folder / "events_np" / kind / f"cifar10_{kind}_{number}.npz", random_events(rng, 128, 128))


MAKERS = {
    "ncaltech101": make_ncaltech101,
    "ncaltech101-spikingjelly": make_ncaltech101_spikingjelly,
    "dvs-lip": make_dvs_lip,
    "asl-dvs": make_asl_dvs,
    "gesture-spikingjelly": make_gesture_spikingjelly,
    "gesture-tonic": make_gesture_tonic,
    "cifar10-dvs-spikingjelly": make_cifar10_dvs_spikingjelly,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dest", type=Path, help="folder for the copies")
    args = parser.parse_args()
    for name, make in MAKERS.items():
        make(args.dest / name)
        print(args.dest / name)


if __name__ == "__main__":
    main()
