#!/usr/bin/env python3
"""Measure how fast recordings become frames: multifire compared with straightforward NumPy, on one thread.

usage: benchmarks/events.py [--events N] [--runs N] [--out FOLDER]

Writes the same synthetic events in every format that is read without another program: those of a DVS128 camera in
AEDAT 2.0 and 3.1, those of a DAVIS346 in AEDAT 2.0, NPY, NPZ, HDF5, CSV, DAT, EVT2 and EVT3. Each recording has twelve
windows of 40 slices of 30 ms. Each window becomes frames [40, 2, 32, 32], of the DVS128 in three ways, which run in
turns:

    stream     frames_of_windows, as `multifire data prepare` uses it (every format)
    array      read_events for the whole file, then to_frames for each window
    numpy      np.frombuffer into a structured array, then np.add.at for each slice

Each run is a process of its own. It reports the computing time from opening the file to the last frame, and its peak
memory. All ways and formats of a camera must return the same counts. Writes events.csv (every run) and events.md
(medians, machine, versions).
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
from multifire.events.convert import convert
from multifire.utils.device import processor
from multifire.utils.memory import peak_resident

WINDOWS, SLICES, SLICE_US = 12, 40, 30_000
WINDOW_US = SLICES * SLICE_US
DVS128, DAVIS346 = (128, 128), (260, 346)
SMALL_FORMATS = ("aedat2", "aedat3.1")
LARGE_FORMATS = ("aedat2 davis", "npy", "npz", "hdf5", "csv", "dat", "evt2", "evt3")
"""Formats of the recordings of the DVS128, and of those of the DAVIS346."""
WAYS = ("stream", "array", "numpy")
MAX_PEAK = 150 << 20
"""Bytes of memory that a process may take in which a recording of any length is streamed; imports take 45 MB."""
RESULTS = Path(__file__).parent / "results"


def write_recordings(folder: Path, count: int) -> dict[str, Path]:
    """Write recordings of `count` random events of a DVS128 and of a DAVIS346; return the path for each format."""
    rng = np.random.default_rng(0)
    t = np.sort(rng.integers(0, WINDOWS * WINDOW_US, count))
    t[:: count // WINDOWS] = np.arange(len(t[:: count // WINDOWS])) * WINDOW_US  # every window begins with an event
    t.sort()
    p = rng.integers(0, 2, count)
    x, y = rng.integers(0, DVS128[1], count), rng.integers(0, DVS128[0], count)
    paths = {format: folder / f"dvs128.{format}" for format in SMALL_FORMATS}
    save(folder / "dvs128.npy", t, x, y, p)
    for format, path in paths.items():
        convert(lambda: open_recording(folder / "dvs128.npy", sensor_size=DVS128), path, format)
    x, y = rng.integers(0, DAVIS346[1], count), rng.integers(0, DAVIS346[0], count)
    paths |= {name: folder / f"davis346.{name.replace(' ', '-')}" for name in LARGE_FORMATS}
    save(paths["npy"], t, x, y, p)
    for name in ("aedat2 davis", "npz", "hdf5", "csv"):
        to = name.removesuffix(" davis")
        convert(lambda: open_recording(paths["npy"], sensor_size=DAVIS346), paths[name], to)
    head = "% Data file containing CD events.\n% Version 2\n% Height 260\n% Width 346\n"
    paths["dat"].write_bytes(head.encode() + b"\x0c\x08" + pairs(t, x | y << 14 | p << 28))
    head = "% evt 2.0\n% format EVT2;height=260;width=346\n% end\n"
    paths["evt2"].write_bytes(head.encode() + pairs(8 << 28 | t >> 6, p << 28 | (t & 63) << 22 | x << 11 | y))
    words = np.stack([8 << 12 | (t >> 12) & 4095, 6 << 12 | t & 4095, y, 2 << 12 | p << 11 | x], 1).astype("<u2")
    head = "% evt 3.0\n% format EVT3;height=260;width=346\n% end\n"
    paths["evt3"].write_bytes(head.encode() + words.tobytes())
    return paths


def save(path: Path, t: np.ndarray, x: np.ndarray, y: np.ndarray, p: np.ndarray) -> None:
    events = np.empty(len(t), EVENT_DTYPE)
    events["t"], events["x"], events["y"], events["p"] = t, x, y, p
    np.lib.format.write_array(path.open("wb"), events)


def pairs(first: np.ndarray, second: np.ndarray) -> bytes:
    """Return two columns as rows of two words of 32 bits."""
    return np.stack([first, second], 1).astype("<u4").tobytes()


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
    size = DVS128 if format in SMALL_FORMATS else DAVIS346
    open_recording(path, sensor_size=size).close()  # imports what the format needs
    start = time.process_time()
    if way == "stream":
        windows = [(k * WINDOW_US, (k + 1) * WINDOW_US) for k in range(WINDOWS)]
        made = frames_of_windows(lambda: open_recording(path, sensor_size=size), windows, FrameOptions(fit="pad"))
        frames = [window.counts for window in made]
    elif way == "array":
        frames = [to_frames(part) for part in split(read_events(path))]
    else:
        frames = [numpy_frames(part) for part in split(numpy_decode(path, format))]
    seconds = time.process_time() - start
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
                for way in WAYS if format in SMALL_FORMATS else WAYS[:1]:
                    command = [sys.executable, __file__, "--one", way, str(path), format]
                    process = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
                    figures = json.loads(process.stdout)
                    rows.append({"format": format, "way": way, "run": run, "events": count} | figures)
                    rows[-1] |= {"file_bytes": path.stat().st_size, "mevents_per_s": count / figures["seconds"] / 1e6}
                    print(format, way, run, f"{rows[-1]['mevents_per_s']:.1f} million events/s", flush=True)
    for formats in (SMALL_FORMATS, LARGE_FORMATS):
        digests = {row["sha256"] for row in rows if row["format"] in formats}
        assert len(digests) == 1, f"{formats}: the same events give different frames"
    for row in rows:
        assert row["way"] != "stream" or row["peak_bytes"] < MAX_PEAK, f"{row['format']}: {row['peak_bytes']:,} bytes"
    return rows


def report(rows: list[dict], runs: int) -> str:
    """Return a Markdown page with the medians of all runs."""
    count = rows[0]["events"]
    lines = [
        "# From file to frames",
        "",
        f"{count:,} events, {WINDOWS} windows of {SLICES} slices of {SLICE_US // 1000} ms, frames 2 × 32 × 32; "
        f"median of {runs} runs with one thread, in events per second of computing time. Each run is a process of its "
        "own; the file is in the page cache. aedat2 and aedat3.1: a DVS128; the others: a DAVIS346, 346 × 260 pixels.",
        f"{processor()}, {os.cpu_count()} cores; Python {platform.python_version()}, NumPy {np.__version__}, "
        f"multifire {__version__}; {platform.platform()}; "
        f"{os.getloadavg()[0]:.0f} processes ready to run. Written by `benchmarks/events.py`.",
        "",
        "| format | way | million events/s (min to max) | × NumPy | peak memory, MB | × file |",
        "|---|---|---|---|---|---|",
    ]
    for format in dict.fromkeys(row["format"] for row in rows):
        rows_of = {way: [row for row in rows if (row["format"], row["way"]) == (format, way)] for way in WAYS}
        rows_of = {way: of_way for way, of_way in rows_of.items() if of_way}
        medians = {way: statistics.median(run["mevents_per_s"] for run in of_way) for way, of_way in rows_of.items()}
        for way, of_way in rows_of.items():
            rates = [row["mevents_per_s"] for row in of_way]
            relative = f"{medians[way] / medians['numpy']:.1f}" if "numpy" in medians else ""
            peak = statistics.median(row["peak_bytes"] for row in of_way)
            lines.append(
                f"| {format} | {way} | {medians[way]:.1f} ({min(rates):.1f} to {max(rates):.1f}) | "
                f"{relative} | {peak / 1e6:.0f} | {peak / of_way[0]['file_bytes']:.2f} |"
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
