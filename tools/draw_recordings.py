#!/usr/bin/env python3
"""Draw the recordings of an archive in one picture: a row for each recording, with frames in order of time.

usage: tools/draw_recordings.py ZIP [OUT]

ZIP is an archive of AEDAT 2.0 recordings of a DVS128 camera. OUT is the PNG file to write. Every frame shows the same
number of events.
"""

import argparse
import io
import zipfile
from pathlib import Path

import numpy as np

from multifire.events import read_events, to_frames
from multifire.utils import images

OUT = Path(__file__).parents[1] / "docs/images/dvs128-recordings.png"
FRAMES = 6
"""Frames of each recording."""
EVENTS = 3_000
"""Events in a frame. A moving person causes that many in some tens of milliseconds."""


def draw_row(content: bytes) -> list[np.ndarray]:
    """Return the pictures of one recording, given the content of its file."""
    events = read_events(io.BytesIO(content))
    starts = np.linspace(0, len(events), FRAMES + 2)[1:-1].astype(int)
    parts = [events[start : start + EVENTS] for start in starts]
    frames = [to_frames(part, size=(128, 128), timesteps=1, slicing="count")[0] for part in parts]
    return [images.enlarge(images.paint(frame), 200) for frame in frames]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("zip", type=Path, help="archive of recordings")
    parser.add_argument("out", type=Path, nargs="?", default=OUT, help=f"PNG file to write (default: {OUT})")
    args = parser.parse_args()
    with zipfile.ZipFile(args.zip) as file:
        names = sorted(name for name in file.namelist() if name.endswith(".aedat"))
        sheet = images.tile([draw_row(file.read(name)) for name in names])
    args.out.parent.mkdir(parents=True, exist_ok=True)
    images.save(args.out, sheet[None], 0)
    print(f"{args.out} shows, from top to bottom: {', '.join(names)}")


if __name__ == "__main__":
    main()
