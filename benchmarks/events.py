#!/usr/bin/env python3
"""Measure how fast recordings become frames: multifire compared with straightforward NumPy, on one thread.

usage: benchmarks/events.py [--events N] [--runs N] [--out FOLDER]

Writes two synthetic recordings of a DVS128 camera: one in AEDAT 2.0, and one in AEDAT 3.1 with packets of 2,000 events
and packets of another type between them. Each recording has twelve windows of 40 slices of 30 ms. Each window becomes
frames [40, 2, 32, 32] in three ways, which run in turns:

    stream     frames_of_windows, as `multifire data prepare` uses it
    array      read_events for the whole file, then to_frames for each window
    numpy      np.frombuffer into a structured array, then np.add.at for each slice

Each run is a process of its own. It reports the time from opening the file to the last frame, and its peak memory. The
three ways must return the same counts. Writes events.csv (every run) and events.md (medians, machine, versions).
"""

import argparse
import csv
import hashlib
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from multifire import __version__
from multifire.events import EVENT_DTYPE, FrameOptions, frames_of_windows, open_recording, read_events, to_frames
from multifire.utils.device import processor
from multifire.utils.memory import peak_resident

WINDOWS, SLICES, SLICE_US = 12, 40, 30_000
WINDOW_US = SLICES * SLICE_US
PACKET_EVENTS = 2_000
WAYS = ("stream", "array", "numpy")
RESULTS = Path(__file__).parent / "results"


def write_recordings(folder: Path, count: int) -> dict[str, Path]:
    """Write recordings of `count` random events; return the path for each format."""
    rng = np.random.default_rng(0)
    t = np.sort(rng.integers(0, WINDOWS * WINDOW_US, count))
    x, y, p = rng.integers(0, 128, count), rng.integers(0, 128, count), rng.integers(0, 2, count)
    t[:: count // WINDOWS] = np.arange(len(t[:: count // WINDOWS])) * WINDOW_US  # every window begins with an event
    t.sort()
    paths = {"aedat2": folder / "2.aedat", "aedat3.1": folder / "3.aedat"}
    aedat2_events = np.empty((count, 2), ">u4")
    aedat2_events[:, 0], aedat2_events[:, 1] = y << 8 | (127 - x) << 1 | p, t
    paths["aedat2"].write_bytes(b"#!AER-DAT2.0\r\n" + aedat2_events.tobytes())
    aedat3_events = np.empty((count, 2), "<u4")
    aedat3_events[:, 0], aedat3_events[:, 1] = x << 17 | y << 2 | p << 1 | 1, t
    with paths["aedat3.1"].open("wb") as file:
        file.write(b"#!AER-DAT3.1\r\n#Format: RAW\r\n#Source 1: DVS128\r\n#!END-HEADER\r\n")
        for number, first in enumerate(range(0, count, PACKET_EVENTS)):
            if number % 4 == 0:  # a packet of another type
                file.write(np.array([0 | 1 << 16, 8, 4, 0, 1, 1, 1, 3, int(t[first])], "<u4").tobytes())
            part = aedat3_events[first : first + PACKET_EVENTS]
            file.write(np.array([1 | 1 << 16, 8, 4, 0, *[len(part)] * 3], "<u4").tobytes() + part.tobytes())
    return paths


def numpy_decode(path: Path, format: str) -> np.ndarray:
    """Decode a whole recording with NumPy."""
    data = path.read_bytes()
    if format == "aedat2":
        offset = 0
        while data[offset : offset + 1] == b"#":
            offset = data.index(b"\n", offset) + 1
        raw = np.frombuffer(data, ">u4", offset=offset).reshape(-1, 2)
        address, t = raw[:, 0], raw[:, 1]
        columns = t, 127 - ((address >> 1) & 127), (address >> 8) & 127, address & 1
    else:
        offset = data.index(b"#!END-HEADER\r\n") + 14
        packets = []
        while offset < len(data):
            kind = int.from_bytes(data[offset : offset + 2], "little")
            event_bytes, capacity = (int.from_bytes(data[offset + i : offset + i + 4], "little") for i in (4, 16))
            if kind == 1:  # polarity events
                packets.append(np.frombuffer(data, "<u4", capacity * 2, offset + 28).reshape(-1, 2))
            offset += 28 + event_bytes * capacity
        raw = np.concatenate(packets)
        raw = raw[raw[:, 0] & 1 == 1]  # events that are marked as valid
        columns = raw[:, 1], (raw[:, 0] >> 17) & 0x1FFF, (raw[:, 0] >> 2) & 0x1FFF, (raw[:, 0] >> 1) & 1
    events = np.empty(len(columns[0]), EVENT_DTYPE)
    events["t"], events["x"], events["y"], events["p"] = columns
    return events


def numpy_frames(events: np.ndarray) -> np.ndarray:
    """Count the events of one window in frames with NumPy."""
    frames = np.zeros((SLICES, 2, 32, 32), np.int32)
    edges = np.searchsorted(events["t"], events["t"][0] + np.arange(SLICES + 1) * SLICE_US)
    for frame, first, end in zip(frames, edges[:-1], edges[1:], strict=True):
        part = events[first:end]
        np.add.at(frame, (part["p"], part["y"] // 4, part["x"] // 4), 1)
    return frames


def split(events: np.ndarray) -> list[np.ndarray]:
    """Split the events of a recording into its windows."""
    edges = np.searchsorted(events["t"], np.arange(WINDOWS + 1) * WINDOW_US)
    return [events[first:end] for first, end in itertools.pairwise(edges)]


def run_one(way: str, path: Path, format: str) -> None:
    """Turn a recording into frames in one way, and print time, peak memory and digest as JSON.

    This runs in a process of its own.
    """
    start = time.perf_counter()
    if way == "stream":
        windows = [(k * WINDOW_US, (k + 1) * WINDOW_US) for k in range(WINDOWS)]
        frames = [window.counts for window in frames_of_windows(lambda: open_recording(path), windows, FrameOptions())]
    elif way == "array":
        frames = [to_frames(part) for part in split(read_events(path))]
    else:
        frames = [numpy_frames(part) for part in split(numpy_decode(path, format))]
    seconds = time.perf_counter() - start
    content = np.minimum(np.stack(frames), 255).astype(np.uint8).tobytes()
    digest = hashlib.sha256(content).hexdigest()
    print(json.dumps({"seconds": seconds, "peak_bytes": peak_resident(), "sha256": digest}))


def run_all(count: int, runs: int) -> list[dict]:
    """Measure every format and way in turns; return a row for each run."""
    rows = []
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as folder:
        paths = write_recordings(Path(folder), count)
        for run in range(runs):
            for format, path in paths.items():
                for way in WAYS:
                    command = [sys.executable, __file__, "--one", way, str(path), format]
                    process = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
                    figures = json.loads(process.stdout)
                    rows.append({"format": format, "way": way, "run": run, "events": count} | figures)
                    rows[-1] |= {"file_bytes": path.stat().st_size, "mevents_per_s": count / figures["seconds"] / 1e6}
                    print(format, way, run, f"{rows[-1]['mevents_per_s']:.1f} million events/s", flush=True)
    for format in paths:
        digests = {row["sha256"] for row in rows if row["format"] == format}
        assert len(digests) == 1, f"{format}: the three ways return different frames"
    return rows


def report(rows: list[dict], runs: int) -> str:
    """Return a Markdown page with the medians of all runs."""
    count = rows[0]["events"]
    lines = [
        "# From file to frames",
        "",
        f"{count:,} events, {WINDOWS} windows of {SLICES} slices of {SLICE_US // 1000} ms, frames 2 × 32 × 32; "
        f"median of {runs} runs with one thread. Each run is a process of its own; the file is in the page cache.",
        f"{processor()}, {os.cpu_count()} cores; Python {platform.python_version()}, NumPy {np.__version__}, "
        f"multifire {__version__}; {platform.platform()}. Written by `benchmarks/events.py`.",
        "",
        "| format | way | million events/s (min to max) | × NumPy | peak memory, MB | × file |",
        "|---|---|---|---|---|---|",
    ]
    for format in dict.fromkeys(row["format"] for row in rows):
        rows_of = {way: [row for row in rows if (row["format"], row["way"]) == (format, way)] for way in WAYS}
        medians = {way: statistics.median(run["mevents_per_s"] for run in of_way) for way, of_way in rows_of.items()}
        for way, of_way in rows_of.items():
            rates = [row["mevents_per_s"] for row in of_way]
            peak = statistics.median(row["peak_bytes"] for row in of_way)
            lines.append(
                f"| {format} | {way} | {medians[way]:.1f} ({min(rates):.1f} to {max(rates):.1f}) | "
                f"{medians[way] / medians['numpy']:.1f} | {peak / 1e6:.0f} | {peak / of_way[0]['file_bytes']:.2f} |"
            )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--events", type=int, default=20_000_000, help="events of a recording (default: 20000000)")
    parser.add_argument("--runs", type=int, default=5, help="runs of each way (default: 5)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for events.csv and events.md")
    parser.add_argument("--one", nargs=3, metavar=("WAY", "PATH", "FORMAT"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        run_one(args.one[0], Path(args.one[1]), args.one[2])
        return
    rows = run_all(args.events, args.runs)
    args.out.mkdir(parents=True, exist_ok=True)
    with (args.out / "events.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    text = report(rows, args.runs)
    (args.out / "events.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
