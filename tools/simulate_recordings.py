#!/usr/bin/env python3
"""Simulate recordings of the embedded digits before a DAVIS346 camera, in folders of classes.

usage: tools/simulate_recordings.py DEST [--train N] [--test N] [--to FORMAT]

The camera makes three saccades over each digit, which is enlarged to 140 × 140 pixels. DEST gets
train/DIGIT/NUMBER.aedat and test/DIGIT/NUMBER.aedat, AEDAT 2.0 unless FORMAT says otherwise. Train on them with

    multifire train digits-dvs --data.name recordings --data.root DEST --data.frame-size 32 --data.fit crop
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np

import multifire as mf
from multifire.events import Recording
from multifire.events.convert import convert
from multifire.events.recording import Packed
from multifire.events.simulate import SaccadeOptions, simulate_events

SENSOR = (260, 346)
ENLARGE = 5
OPTIONS = SaccadeOptions(sensor_size=SENSOR, amplitude=4.0 * ENLARGE)
ENDINGS = {"aedat2": "aedat", "aedat3.1": "aedat", "npz": "npz", "hdf5": "h5", "csv": "csv"}


def simulated(split: str, count: int) -> Iterator[tuple[int, Recording]]:
    """Yield the label and the recording, in memory, of the first `count` digits of "train" or "test"."""
    digits = getattr(mf.datasets.load("digits"), split)
    images = digits.images[:count, 0].repeat(ENLARGE, 1).repeat(ENLARGE, 2)
    labels = digits.labels[:count].tolist()
    for label, events in zip(labels, simulate_events(images, OPTIONS, seed=int(split == "test")), strict=True):
        yield label, in_memory(events)


def in_memory(events: np.ndarray) -> Recording:
    """Return events of the DAVIS346 as a recording."""
    t, x, y, p = (events[name].astype(np.int64) for name in "txyp")
    return Recording("simulated", "simulated", SENSOR, iter((Packed(t, (y * SENSOR[1] + x) * 2 + p),)))


def write_recordings(dest: Path, train: int, test: int, to: str = "aedat2") -> None:
    """Write the recordings below `dest`."""
    for split, count in (("train", train), ("test", test)):
        for number, (label, recording) in enumerate(simulated(split, count)):
            path = dest / split / str(label) / f"{number:04}.{ENDINGS[to]}"
            path.parent.mkdir(parents=True, exist_ok=True)
            convert(lambda recording=recording: recording, path, to)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dest", type=Path, help="folder for the recordings")
    parser.add_argument("--train", type=int, default=1000, help="number of digits for training (default: 1000)")
    parser.add_argument("--test", type=int, default=200, help="number of digits for the test (default: 200)")
    parser.add_argument("--to", choices=ENDINGS, default="aedat2", help="format (default: aedat2)")
    args = parser.parse_args()
    write_recordings(args.dest, args.train, args.test, args.to)
    print(f"{args.dest}: {args.train:,} training and {args.test:,} test recordings of a simulated DAVIS346")


if __name__ == "__main__":
    main()
