#!/usr/bin/env python3
"""Draw which way up each format is: a letter F in the addresses of a file, and the frame that multifire makes of it.

usage: tools/draw_orientation.py [OUT]

In each file the F stands upright if its first row is drawn at the top and its first column at the left, as the fields y
and x of the file count them. OUT is the PNG file to write.
"""

import argparse
import io
import struct
from pathlib import Path

import numpy as np

from multifire.events import read_events, to_frames
from multifire.utils import images

OUT = Path(__file__).parents[1] / "docs/images/orientation.png"
LETTER = ["XXXXX", "X....", "XXXX.", "X....", "X....", "X...."]
SIZE, CELL, MARGIN = 34, 4, 6


def letter() -> tuple[np.ndarray, np.ndarray]:
    """Return columns and rows of the pixels of a large F."""
    picture = np.array([[sign == "X" for sign in line] for line in LETTER]).repeat(CELL, 0).repeat(CELL, 1)
    rows, columns = np.nonzero(picture)
    return columns + MARGIN, rows + MARGIN


def files() -> dict[str, bytes]:
    """Return files in which the fields x and y of the events are the columns and rows of the F."""
    x, y = letter()
    t = np.arange(len(x))
    dvs128, davis = np.stack([y << 8 | x << 1 | 1, t], 1), np.stack([y << 22 | x << 12 | 1 << 11, t], 1)
    packet = struct.pack("<HHIIIIII", 1, 1, 8, 4, 0, len(x), len(x), len(x))
    evt3 = np.stack([8 << 12 | t >> 12, 6 << 12 | t, y, 2 << 12 | 1 << 11 | x], 1).astype("<u2")
    npz = io.BytesIO()
    np.savez(npz, t=t, x=x, y=y, p=np.ones(len(x), bool))
    return {
        "AEDAT 2.0, DVS128": b"#!AER-DAT2.0\r\n# AEChip: DVS128\r\n" + dvs128.astype(">u4").tobytes(),
        "AEDAT 2.0, DAVIS": b"#!AER-DAT2.0\r\n# AEChip: DAVIS240C\r\n" + davis.astype(">u4").tobytes(),
        "AEDAT 3.1": b"#!AER-DAT3.1\r\n#!END-HEADER\r\n"
        + packet
        + np.stack([x << 17 | y << 2 | 3, t], 1).astype("<u4").tobytes(),
        "EVT3": b"% evt 3.0\n% end\n" + evt3.tobytes(),
        "NPZ": npz.getvalue(),
        "CSV": b"t,x,y,p\n" + b"".join(b"%d,%d,%d,1\n" % row for row in zip(t, x, y, strict=True)),
    }


def frame(content: bytes, mirrored: bool) -> np.ndarray:
    """Return the frame [2, SIZE, SIZE] of a file; a DVS128's F lies at the right edge of its 128 columns."""
    events = read_events(io.BytesIO(content), (SIZE, SIZE))
    if mirrored:
        events["x"] -= 128 - SIZE
    return to_frames(events, (SIZE, SIZE), (SIZE, SIZE), timesteps=1, slicing="time")[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, nargs="?", default=OUT, help=f"PNG file to write (default: {OUT})")
    args = parser.parse_args()
    frames = [frame(content, name.endswith("DVS128")) for name, content in files().items()]
    turned = [frames[-1], frames[-1][..., ::-1], frames[-1][:, ::-1], frames[-1][:, ::-1, ::-1]]
    rows = [[images.enlarge(images.paint(item), 136) for item in row] for row in (frames, turned)]
    images.save(args.out, images.tile(rows)[None], 0)
    print(f"{args.out}: above {', '.join(files())}; below as read, flip-x, flip-y, both")


if __name__ == "__main__":
    main()
