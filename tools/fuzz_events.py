#!/usr/bin/env python3
"""Coverage-guided fuzzing of the readers of event recordings: nothing but ValueError, no hang, no large allocation.

To run it again, in an environment of its own with NumPy and atheris (Linux):

    python -m venv /tmp/fuzz && /tmp/fuzz/bin/pip install atheris numpy
    PYTHONPATH=src /tmp/fuzz/bin/python tools/fuzz_events.py -runs=200000 -max_len=4096 [FOLDER of the inputs found]

The first byte of an input chooses the magic number that is put before the rest (AEDAT 2.0, AEDAT 3.1, none with
N-MNIST's name, none at all), so that every reader is reached. For each input it reads the chunks, under a limit of one
second of processor time and of ten times the input's bytes (64 KiB for a small one) of memory; then the events, and
frames in each way of slicing. Options are libFuzzer's. A failing input is written to crash-*; give its name to
run it alone.
"""

import contextlib
import io
import logging
import sys
import tempfile
import time
import tracemalloc
from pathlib import Path

import atheris  # pyright: ignore - see above
import numpy as np

with atheris.instrument_imports(include=["multifire"]):  # pyright: ignore[reportAttributeAccessIssue]
    from multifire.events import FrameOptions, frames_of_windows, open_recording, read_events
    from multifire.events.frames import Slicing

CPU_SECONDS = 1.0
TIMES_INPUT, FLOOR_BYTES = 10, 1 << 16
HEAD_31 = b"#!AER-DAT3.1\r\n#Source 1: DVS128\r\n#!END-HEADER\r\n"
KINDS = ((b"#!AER-DAT2.0\r\n", ""), (HEAD_31, ""), (b"", "x.bin"), (b"", ""))
SLICINGS: tuple[Slicing, ...] = ("duration", "time", "count")


def test_one(data: bytes) -> None:
    if not data:
        return
    magic, name = KINDS[data[0] % len(KINDS)]
    content = magic + data[1:]
    tracemalloc.start()
    began = time.process_time()
    with contextlib.suppress(ValueError), open_recording(io.BytesIO(content), name) as recording:
        for chunk in recording.chunks():
            assert len(chunk.t) == len(chunk.x) == len(chunk.y) == len(chunk.p)
            assert (np.diff(chunk.t) >= 0).all()
    seconds, peak = time.process_time() - began, tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    if seconds > CPU_SECONDS:
        raise RuntimeError(f"{len(content):,} bytes took {seconds:.2f} s")
    if peak > max(TIMES_INPUT * len(content), FLOOR_BYTES):
        raise RuntimeError(f"{len(content):,} bytes took {peak:,} bytes of memory")
    with contextlib.suppress(ValueError):
        assert (np.diff(read_events(io.BytesIO(content))["t"]) >= 0).all()
    slicing = SLICINGS[data[0] // len(KINDS) % len(SLICINGS)]
    options = FrameOptions((8, 8), timesteps=4, slicing=slicing, duration_us=1000)
    with contextlib.suppress(ValueError):
        windows = [(None, None), (0, 10_000)]
        whole = frames_of_windows(lambda: open_recording(io.BytesIO(content), name), windows, options)[0]
        assert whole.events > 0
        assert whole.clipped or whole.counts.sum() == whole.events


def seeds() -> list[bytes]:
    """A small sound input for each reader, each way of slicing, and a few that are almost sound."""
    rng = np.random.default_rng(0)
    events = [rng.integers(0, 1 << 15, 20).astype(">u4"), np.sort(rng.integers(0, 99_999, 20)).astype(">u4")]
    aedat2 = b"# more\r\n" + np.stack(events, 1).tobytes()
    body = np.stack([rng.integers(0, 128, 9) << 17 | 5, np.arange(9)], 1).astype("<u4").tobytes()
    packet = np.array([1 | 1 << 16, 8, 4, 0, 9, 9, 9], "<u4").tobytes() + body
    special = np.array([0 | 1 << 16, 8, 4, 1, 1, 1, 1, 1, 1], "<u4").tobytes()
    wrapped = np.array([1 | 1 << 16, 8, 4, 1, 9, 9, 9], "<u4").tobytes() + body
    records = np.concatenate([rng.integers(0, 34, (20, 2)), np.sort(rng.integers(0, 99, (20, 3)), 0)], 1)
    records[10, 1] = 240
    nmnist = records.astype(np.uint8).tobytes()
    bodies = (aedat2, packet + special + wrapped, nmnist, nmnist)
    sound = [bytes([kind + 4 * way]) + body for kind, body in enumerate(bodies) for way in range(3)]
    return sound + [b"\x03" + magic + body for (magic, _), body in zip(KINDS, bodies, strict=True)]


def main() -> None:
    logging.disable(logging.CRITICAL)
    with tempfile.TemporaryDirectory() as folder:
        for number, content in enumerate(seeds()):
            (Path(folder) / str(number)).write_bytes(content)
        files = any(not argument.startswith("-") and Path(argument).is_file() for argument in sys.argv[1:])
        atheris.Setup(sys.argv if files else [*sys.argv, folder], test_one)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
