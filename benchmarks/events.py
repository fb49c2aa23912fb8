#!/usr/bin/env python3
"""From a recording's file to frames: multifire beside straightforward NumPy, on one core.

usage: benchmarks/events.py [--events N] [--runs N] [--out FOLDER]

Writes two synthetic recordings of a DVS128 (AEDAT 2.0, and AEDAT 3.1 in packets of 2,000 events with others between),
twelve windows of 40 slices of 30 ms, and takes them to frames [40, 2, 32, 32] in each of three ways, in turns, each
time in a process of its own, which reports its time from opening the file to the last frame and its peak memory:

    stream     frames_of_windows, as `data prepare` does it
    array      read_events, then to_frames of each window
    numpy      np.frombuffer to a structured array, then np.add.at for each slice

The three must give the same counts. Writes events.csv (every run) and events.md (medians, machine, versions).
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
    rng = np.random.default_rng(0)
    t = np.sort(rng.integers(0, WINDOWS * WINDOW_US, count))
    x, y, p = rng.integers(0, 128, count), rng.integers(0, 128, count), rng.integers(0, 2, count)
    t[:: count // WINDOWS] = np.arange(len(t[:: count // WINDOWS])) * WINDOW_US  # a first event for each window
    t.sort()
    paths = {"aedat2": folder / "2.aedat", "aedat3.1": folder / "3.aedat"}
    big = np.empty((count, 2), ">u4")
    big[:, 0], big[:, 1] = y << 8 | (127 - x) << 1 | p, t
    paths["aedat2"].write_bytes(b"#!AER-DAT2.0\r\n" + big.tobytes())
    little = np.empty((count, 2), "<u4")
    little[:, 0], little[:, 1] = x << 17 | y << 2 | p << 1 | 1, t
    with paths["aedat3.1"].open("wb") as file:
        file.write(b"#!AER-DAT3.1\r\n#Format: RAW\r\n#Source 1: DVS128\r\n#!END-HEADER\r\n")
        for number, first in enumerate(range(0, count, PACKET_EVENTS)):
            if number % 4 == 0:
                file.write(np.array([0 | 1 << 16, 8, 4, 0, 1, 1, 1, 3, int(t[first])], "<u4").tobytes())
            part = little[first : first + PACKET_EVENTS]
            file.write(np.array([1 | 1 << 16, 8, 4, 0, *[len(part)] * 3], "<u4").tobytes() + part.tobytes())
    return paths


def numpy_decode(path: Path, format: str) -> np.ndarray:
    data = path.read_bytes()
    if format == "aedat2":
        at = 0
        while data[at : at + 1] == b"#":
            at = data.index(b"\n", at) + 1
        raw = np.frombuffer(data, ">u4", offset=at).reshape(-1, 2)
        address, t = raw[:, 0], raw[:, 1]
        columns = t, 127 - ((address >> 1) & 127), (address >> 8) & 127, address & 1
    else:
        at = data.index(b"#!END-HEADER\r\n") + 14
        packets = []
        while at < len(data):
            kind = int.from_bytes(data[at : at + 2], "little")
            size, capacity = (int.from_bytes(data[at + i : at + i + 4], "little") for i in (4, 16))
            if kind == 1:
                packets.append(np.frombuffer(data, "<u4", capacity * 2, at + 28).reshape(-1, 2))
            at += 28 + size * capacity
        raw = np.concatenate(packets)
        raw = raw[raw[:, 0] & 1 == 1]
        columns = raw[:, 1], (raw[:, 0] >> 17) & 0x1FFF, (raw[:, 0] >> 2) & 0x1FFF, (raw[:, 0] >> 1) & 1
    events = np.empty(len(columns[0]), EVENT_DTYPE)
    events["t"], events["x"], events["y"], events["p"] = columns
    return events


def numpy_frames(events: np.ndarray) -> np.ndarray:
    frames = np.zeros((SLICES, 2, 32, 32), np.int32)
    edges = np.searchsorted(events["t"], events["t"][0] + np.arange(SLICES + 1) * SLICE_US)
    for frame, first, behind in zip(frames, edges[:-1], edges[1:], strict=True):
        part = events[first:behind]
        np.add.at(frame, (part["p"], part["y"] // 4, part["x"] // 4), 1)
    return frames


def split(events: np.ndarray) -> list[np.ndarray]:
    edges = np.searchsorted(events["t"], np.arange(WINDOWS + 1) * WINDOW_US)
    return [events[first:behind] for first, behind in itertools.pairwise(edges)]


def run_one(way: str, path: Path, format: str) -> None:
    """In a process of its own: one way from file to frames; prints a line of JSON."""
    began = time.perf_counter()
    if way == "stream":
        windows = [(k * WINDOW_US, (k + 1) * WINDOW_US) for k in range(WINDOWS)]
        frames = [f.counts for f in frames_of_windows(lambda: open_recording(path), windows, FrameOptions())]
    elif way == "array":
        frames = [to_frames(part) for part in split(read_events(path))]
    else:
        frames = [numpy_frames(part) for part in split(numpy_decode(path, format))]
    seconds = time.perf_counter() - began
    content = np.minimum(np.stack(frames), 255).astype(np.uint8).tobytes()
    digest = hashlib.sha256(content).hexdigest()
    print(json.dumps({"seconds": seconds, "peak_bytes": peak_resident(), "sha256": digest}))


def run_all(count: int, runs: int) -> list[dict]:
    rows = []
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as folder:
        paths = write_recordings(Path(folder), count)
        for run in range(runs):
            for format, path in paths.items():
                for way in WAYS:
                    command = [sys.executable, __file__, "--one", way, str(path), format]
                    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
                    found = json.loads(done.stdout)
                    rows.append({"format": format, "way": way, "run": run, "events": count} | found)
                    rows[-1] |= {"file_bytes": path.stat().st_size, "mevents_per_s": count / found["seconds"] / 1e6}
                    print(format, way, run, f"{rows[-1]['mevents_per_s']:.1f} million/s", flush=True)
    for format in paths:
        digests = {row["sha256"] for row in rows if row["format"] == format}
        assert len(digests) == 1, f"{format}: the ways give different frames"
    return rows


def report(rows: list[dict], runs: int) -> str:
    count = rows[0]["events"]
    lines = [
        "# From file to frames",
        "",
        f"{count:,} events, {WINDOWS} windows of {SLICES} slices of {SLICE_US // 1000} ms, frames 2 × 32 × 32; "
        f"median of {runs} runs, one core, each run a process of its own, file in the page cache.",
        f"{processor()}, {os.cpu_count()} cores; Python {platform.python_version()}, NumPy {np.__version__}, "
        f"multifire {__version__}; {platform.platform()}. Made by `benchmarks/events.py`.",
        "",
        "| format | way | million events/s (min to max) | × NumPy | peak memory, MB | × file |",
        "|---|---|---|---|---|---|",
    ]
    for format in dict.fromkeys(row["format"] for row in rows):
        of = {way: [row for row in rows if (row["format"], row["way"]) == (format, way)] for way in WAYS}
        rate = {way: statistics.median(row["mevents_per_s"] for row in found) for way, found in of.items()}
        for way, found in of.items():
            rates = [row["mevents_per_s"] for row in found]
            peak = statistics.median(row["peak_bytes"] for row in found)
            lines.append(
                f"| {format} | {way} | {rate[way]:.1f} ({min(rates):.1f} to {max(rates):.1f}) | "
                f"{rate[way] / rate['numpy']:.1f} | {peak / 1e6:.0f} | {peak / found[0]['file_bytes']:.2f} |"
            )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--events", type=int, default=20_000_000)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--out", type=Path, default=RESULTS)
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
