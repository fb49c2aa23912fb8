#!/usr/bin/env python3
"""Feed the readers of recordings with what libFuzzer makes up, guided by the branches that it reaches.

usage: fuzz_events.py READER [libFuzzer's options]     READER: aedat2, aedat3.1, nmnist, any, aedat4, evt

The inputs that reach new branches gather in ./fuzz-seeds-READER. The first finding ends the run and its input is
written to ./crash-*. A finding is: anything raised but ValueError; more than a second; an allocation (as tracemalloc
sees it, NumPy's included) of more than 10 × the input, small inputs counted as FLOOR; events that are out of order or
outside the sensor; events or frames that depend on how much is read at a time. What faery allocates is not seen, and
faery 0.7.1 itself ends the process on some damaged AEDAT4, so a run over aedat4 stops there.

To run it again, beside an installed multifire (aedat4 and evt need the extra `cameras` too):

    pip install atheris
    for reader in aedat2 aedat3.1 nmnist any; do python tools/fuzz_events.py $reader -runs=60000 -max_len=512; done
    for reader in aedat4 evt; do python tools/fuzz_events.py $reader -runs=20000 -max_len=2048; done
    python tools/fuzz_events.py nmnist crash-0123abcd            # that input alone
"""

import io
import logging
import os
import sys
import tempfile
import time
import tracemalloc
from pathlib import Path
from typing import Any

import atheris  # pyright: ignore[reportMissingImports, reportMissingModuleSource] - see above
import numpy as np

with atheris.instrument_imports(include=["multifire.events"]):  # pyright: ignore[reportAttributeAccessIssue]
    from multifire.events import aedat, read_events, recording, to_frames

SECONDS = 1.0
TIMES_INPUT = 10
FLOOR = 32_768
"""Bytes that a smaller input counts as: a file's head, buffers and messages cost some whatever its size."""
CHUNKS = (1 << 18, 120)
"""Bytes read at a time; 120 holds whole records of both five and eight bytes."""

BEGINNINGS = {
    "aedat2": b"#!AER-DAT2.0\r\n",
    "aedat3.1": b"#!AER-DAT3.1\r\n#Source 1: DVS128\r\n#!END-HEADER\r\n",
    "nmnist": b"",
    "any": b"",
    "aedat4": b"#!AER-DAT4.0\r\n",
    "evt": b"% evt ",
}
NEED_A_FILE = ("aedat4", "evt")


class Named(io.BytesIO):
    """A file with a name, by which N-MNIST's are known."""

    name = "fuzz.bin"


class Trickle(Named):
    """The same as a slow pipe gives it: few bytes at a time, and no way back."""

    def read(self, size: int | None = -1) -> bytes:
        return super().read(min(size or 0, 61))

    def seek(self, *_: int) -> int:
        raise io.UnsupportedOperation("seek")


SCRATCH = Path(tempfile.gettempdir()) / f"multifire-fuzz-{os.getpid()}.raw"


def read(data: bytes, reader: str, chunk_bytes: int, kind: type[Named] = Named) -> np.ndarray | str:
    """The events, or what the error says."""
    recording.CHUNK_BYTES = aedat.CHUNK_BYTES = chunk_bytes
    try:
        if reader not in NEED_A_FILE:
            return read_events(kind(data))
        SCRATCH.write_bytes(data)
        return read_events(SCRATCH)
    except ValueError as error:
        return str(error)


def check(data: bytes, reader: str) -> None:
    data = BEGINNINGS[reader] + data
    began = time.monotonic()
    tracemalloc.reset_peak()
    before = tracemalloc.get_traced_memory()[0]
    events = read(data, reader, CHUNKS[0])
    peak = tracemalloc.get_traced_memory()[1] - before
    seconds = time.monotonic() - began
    assert seconds < SECONDS, f"{seconds:.2f} s for {len(data):,} bytes"
    most = TIMES_INPUT * max(len(data), FLOOR)
    assert peak <= most, f"{peak:,} bytes allocated for {len(data):,}, expected at most {most:,}"
    STATISTICS["read" if isinstance(events, np.ndarray) else "refused"] += 1
    STATISTICS["most bytes allocated"] = max(STATISTICS["most bytes allocated"], peak)
    STATISTICS["longest ms"] = max(STATISTICS["longest ms"], int(1000 * seconds))
    if (STATISTICS["read"] + STATISTICS["refused"]) % 5000 == 0:
        print(f"{reader}: {', '.join(f'{name} {value:,}' for name, value in STATISTICS.items())}", flush=True)
    if reader not in NEED_A_FILE:
        check_same(events, read(data, reader, CHUNKS[1], Trickle))
    if isinstance(events, np.ndarray):
        check_events(events)


STATISTICS = {"read": 0, "refused": 0, "most bytes allocated": 0, "longest ms": 0}


def check_same(events: np.ndarray | str, again: np.ndarray | str) -> None:
    if isinstance(events, str):
        assert isinstance(again, str), f"refused only when read in larger chunks: {events}"
    else:
        assert not isinstance(again, str), f"refused only when read in smaller chunks: {again}"
        assert np.array_equal(events, again), "depends on how much is read at a time"


def check_events(events: np.ndarray) -> None:
    assert len(events), "no events and no error"
    assert (np.diff(events["t"]) >= 0).all(), "not in order"
    assert min(events["x"].min(), events["y"].min(), events["t"].min()) >= 0, "below 0"
    size = (int(events["y"].max()) + 1, int(events["x"].max()) + 1)
    if max(size) > 1024:
        return  # a table of that sensor's pixels would be larger than the input
    slicing = ("duration", "time", "count")[len(events) % 3]
    counted = int(to_frames(events, size, (2, 3), 1000, 5, slicing=slicing).sum())
    within = events["t"] - events["t"][0] < 5000 if slicing == "duration" else events["t"] >= 0
    assert counted == np.count_nonzero(within), f"{counted} of {np.count_nonzero(within)} events in frames"


def seeds(reader: str) -> list[bytes]:
    """Some whole recordings, behind the reader's beginning, for libFuzzer to start from."""
    rng = np.random.default_rng(0)
    t = np.sort(rng.integers(0, 1 << 20, 24))
    x, y, p = rng.integers(0, 34, 24), rng.integers(0, 34, 24), rng.integers(0, 2, 24)
    big = np.stack([y << 8 | (127 - x) << 1 | p, t], 1).astype(">u4")
    little = np.stack([x << 17 | y << 2 | p << 1 | 1, t], 1).astype("<u4")
    wrapping = big.copy()
    wrapping[12:, 1] = 5
    wrapping[:12, 1] = 0xFFFFFFF0
    forty = np.stack([x, y, p << 7 | t >> 16, t >> 8 & 255, t & 255], 1).astype(np.uint8)
    marked = forty.copy()
    marked[5::7, 1] = 240
    packet = [np.array([1 | 1 << 16, 8, 4, overflow, 30, 24, 24], "<u4") for overflow in (0, 1)]
    room = np.zeros(12, "<u4").tobytes()
    other = np.array([3 | 1 << 16, 12, 4, 0, 1, 1, 1, 7, 7, 7], "<u4").tobytes()
    whole = {
        "aedat2": [b"# a\r\n" + big.tobytes(), wrapping.tobytes(), big[::-1].tobytes() + b"cut"],
        "aedat3.1": [
            packet[0].tobytes() + little.tobytes() + room + other + packet[1].tobytes() + little[::-1].tobytes() + room
        ],
        "nmnist": [forty.tobytes(), marked.tobytes(), forty[::-1].tobytes() + b"cu"],
    }
    if reader == "any":
        return [BEGINNINGS[kind] + seed for kind, some in whole.items() for seed in some]
    return whole[reader] if reader in whole else camera_seeds(reader)


def camera_seeds(reader: str) -> list[bytes]:
    import faery  # pyright: ignore[reportMissingImports] - an extra

    events: Any = np.zeros(200, faery.EVENTS_DTYPE)
    events["t"], events["x"], events["y"] = np.arange(200) * 40, np.arange(200) % 34, np.arange(200) % 33
    stream = faery.events_stream_from_array(events, dimensions=(34, 34))
    found = []
    for options in [{"version": kind} for kind in ("evt2", "evt3")] if reader == "evt" else [{}]:
        path = SCRATCH.with_suffix(".raw" if options else ".aedat4")
        stream.to_file(path, **options)
        found.append(path.read_bytes().removeprefix(BEGINNINGS[reader]))
    return found


def main() -> None:
    if len(sys.argv) < 2 or sys.argv[1] not in BEGINNINGS:
        sys.exit(__doc__)
    reader = sys.argv.pop(1)
    logging.getLogger("multifire").setLevel(logging.CRITICAL)
    corpus = Path(f"fuzz-seeds-{reader}")
    corpus.mkdir(exist_ok=True)
    for number, seed in enumerate(seeds(reader)):
        (corpus / f"seed{number}").write_bytes(seed)
    read(BEGINNINGS[reader], reader, CHUNKS[0])  # what the first call alone imports is not its input's doing
    tracemalloc.start()
    one = any(Path(word).is_file() for word in sys.argv[1:])
    atheris.Setup([*sys.argv, *([] if one else [str(corpus)])], lambda data: check(data, reader))
    atheris.Fuzz()


if __name__ == "__main__":
    main()
