#!/usr/bin/env python3
"""Draw recordings as a contact sheet: a row for each, its frames of equal event counts from left to right.

usage: draw_recordings.py ZIP [OUT]     ZIP: an archive of AEDAT 2.0 recordings of a DVS128; OUT: a .png
"""

import argparse
import io
import zipfile
from pathlib import Path

import numpy as np

from multifire.events import read_events, to_frames
from multifire.utils import images

OUT = Path(__file__).parents[1] / "docs/images/dvs128-recordings.png"
SHOWN = 6
EVENTS = 3_000
"""Drawn in one panel: so many are some tens of milliseconds of a person who moves."""


def row(content: bytes) -> list[np.ndarray]:
    events = read_events(io.BytesIO(content))
    starts = np.linspace(0, len(events), SHOWN + 2)[1:-1].astype(int)
    frames = [to_frames(events[at : at + EVENTS], size=(128, 128), timesteps=1, slicing="count")[0] for at in starts]
    return [images.enlarge(images.paint(frame), 200) for frame in frames]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("zip", type=Path)
    parser.add_argument("out", type=Path, nargs="?", default=OUT)
    args = parser.parse_args()
    with zipfile.ZipFile(args.zip) as file:
        names = sorted(name for name in file.namelist() if name.endswith(".aedat"))
        sheet = images.tile([row(file.read(name)) for name in names])
    args.out.parent.mkdir(parents=True, exist_ok=True)
    images.save(args.out, sheet[None], 0)
    print(f"{args.out}: from top to bottom {', '.join(names)}")


if __name__ == "__main__":
    main()
