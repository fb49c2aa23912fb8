#!/usr/bin/env python3
"""Feed the readers of recordings with damaged and made-up files.

usage: fuzz_events.py READER [options]     READER: aedat2, aedat3.1, nmnist, any, aedat4, evt

aedat2 to any are fed with what libFuzzer makes up (its options), guided by the branches that it reaches; inputs that
reach new ones gather in ./fuzz-seeds-READER. aedat4 and evt are decoded by a compiled library, whose branches it does
not see, so they are fed with random damage to sound files instead (-runs=N, -seed=N), each decoded by a process of its
own under the same limits, but one that is forked, not started, ten times faster.

The first finding ends the run and its input is written to ./crash-*. A finding is: anything raised but ValueError; more
than a second of computing (aedat4 and evt: beyond what a sound file takes; their process's memory is held by its
limits); more memory at any time (as tracemalloc sees it, NumPy's included) than 10 × the input and
FLOOR; events that are out of order or outside the sensor; events or frames that depend on how much is read at a time.

To run it again, beside an installed multifire (aedat4 and evt need the extra `cameras` too):

    pip install atheris
    for reader in aedat2 aedat3.1 nmnist any; do python tools/fuzz_events.py $reader -runs=60000 -max_len=512; done
    for reader in aedat4 evt; do python tools/fuzz_events.py $reader -runs=5000; done
    python tools/fuzz_events.py nmnist crash-0123abcd            # that input alone
"""

import io
import logging
import os
import resource
import signal
import sys
import tempfile
import time
import tracemalloc
from pathlib import Path
from typing import Any

import atheris  # pyright: ignore[reportMissingImports, reportMissingModuleSource] - see above
import numpy as np

with atheris.instrument_imports(include=["multifire.events"]):  # pyright: ignore[reportAttributeAccessIssue]
    from multifire.events import aedat, camera_process, cameras, read_events, recording, to_frames

SECONDS = 1.0
SECONDS_AMPLIFIED = 5.0
"""Of computing, for an input repeated to AMPLIFIED, which the tracing of branches and memory slows tenfold."""
TIMES_INPUT = 10
FLOOR = {"aedat4": 1_000_000, "evt": 1_000_000}
SMALL_FLOOR = 64_000
"""Bytes that reading takes whatever the input's size: its head, messages, the arrays of one packet of a camera's."""
AMPLIFIED = 1 << 20
"""Bytes that some inputs are repeated to, where FLOOR is nothing beside them."""
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
    body, data = data, BEGINNINGS[reader] + data
    events = read_within_limits(data, reader)
    STATISTICS["read" if isinstance(events, np.ndarray) else "refused"] += 1
    count = STATISTICS["read"] + STATISTICS["refused"]
    if count % (500 if reader in NEED_A_FILE else 5000) == 0:
        print(f"{reader}: {', '.join(f'{name} {value:,}' for name, value in STATISTICS.items())}", flush=True)
    if reader not in NEED_A_FILE:
        check_same(events, read(data, reader, CHUNKS[1], Trickle))
        if body and count % 100 == 0:
            read_within_limits(BEGINNINGS[reader] + body * (AMPLIFIED // len(body)), reader, SECONDS_AMPLIFIED)
            STATISTICS["repeated to 1 MB"] += 1
    if isinstance(events, np.ndarray):
        check_events(events)


STATISTICS = {"read": 0, "refused": 0, "repeated to 1 MB": 0, "most bytes beyond 10 × input": 0, "longest ms": 0}


def read_within_limits(data: bytes, reader: str, most_seconds: float = SECONDS) -> np.ndarray | str:
    began = clock()
    tracemalloc.reset_peak()
    before = tracemalloc.get_traced_memory()[0]
    events = read(data, reader, CHUNKS[0])
    beyond = tracemalloc.get_traced_memory()[1] - before - TIMES_INPUT * len(data)
    seconds = clock() - began - STARTING[reader in NEED_A_FILE]
    assert seconds < most_seconds, f"{seconds:.2f} s for {len(data):,} bytes"
    floor = FLOOR.get(reader, SMALL_FLOOR)
    assert beyond <= floor, f"{beyond:,} bytes more than {TIMES_INPUT} × {len(data):,}, expected at most {floor:,}"
    STATISTICS["most bytes beyond 10 × input"] = max(STATISTICS["most bytes beyond 10 × input"], beyond)
    STATISTICS["longest ms"] = max(STATISTICS["longest ms"], int(1000 * seconds))
    return events


def clock() -> float:
    """Seconds of computing, so that what else the machine does does not count; nothing here waits for anything."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + used.ru_utime + used.ru_stime


STARTING = [0.0, 0.0]
"""Seconds that reading takes whatever the input: none, and those of the process."""


class Forked:
    """What `cameras` needs of subprocess.Popen, as a copy of this process, which has faery imported."""

    def __init__(self, command: list[Any], **_: Any):
        reading, writing = os.pipe()
        self.pid = os.fork()
        if not self.pid:
            tracemalloc.stop()
            os.dup2(writing, 1)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            camera_process.main(*map(str, command[-2:]))
        os.close(writing)
        self.stdout = os.fdopen(reading, "rb", buffering=0)
        self.returncode = None

    def wait(self) -> int:
        if self.returncode is None:
            self.returncode = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self.returncode

    def kill(self) -> None:
        if self.returncode is None:
            os.kill(self.pid, signal.SIGKILL)


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

    events: Any = np.zeros(9000, faery.EVENTS_DTYPE)
    rng = np.random.default_rng(0)
    events["t"], events["x"], events["y"] = np.arange(9000) * 40, rng.integers(0, 34, 9000), np.arange(9000) % 33
    kinds: list[Any] = [("raw", {"version": "evt2"}), ("raw", {"version": "evt3"})]
    if reader == "aedat4":
        kinds = [("aedat4", {"compression": (name, 1)}) for name in ("lz4", "zstd")]
    found = []
    for suffix, options in kinds:
        for count in (200, len(events)):
            path = SCRATCH.with_suffix(f".{suffix}")
            faery.events_stream_from_array(events[:count], dimensions=(34, 34)).to_file(path, **options)
            found.append(path.read_bytes().removeprefix(BEGINNINGS[reader]))
            path.unlink()
    return found


def damaged(data: bytes, rng: np.random.Generator) -> bytes:
    """One to three bytes turned, numbers written over, pieces cut out or doubled; more often near the beginning."""
    changed = bytearray(data)
    for _ in range(rng.integers(1, 4)):
        at = int(len(changed) * rng.random() ** rng.choice([1, 1, 1, 6]))
        match rng.integers(8):
            case 0:
                del changed[at : at + int(rng.integers(1, 200))]
            case 1:
                changed[at:at] = changed[at : at + int(rng.integers(1, 200))]
            case 2:
                del changed[max(at, 20) :]
            case 3 | 4:
                number = int(rng.choice([0, 1, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 0x10000000]))
                changed[at : at + 4] = number.to_bytes(4, "little")
            case _:
                changed[at : at + 1] = bytes([rng.integers(256)])
    return bytes(changed)


def damage(reader: str, options: dict[str, str]) -> None:
    cameras.subprocess.Popen = Forked  # pyright: ignore[reportAttributeAccessIssue] - in this process alone
    rng = np.random.default_rng(int(options.get("-seed", 0)))
    sound = seeds(reader)
    began = clock()
    assert isinstance(read(BEGINNINGS[reader] + sound[0], reader, CHUNKS[0]), np.ndarray)
    STARTING[True] = clock() - began
    for number in range(int(options.get("-runs", 5000))):
        data = damaged(sound[number % len(sound)], rng)
        try:
            check(data, reader)
        except BaseException:
            crash = Path(f"crash-{reader}-{number}")
            crash.write_bytes(data)
            print(f"written to {crash}")
            raise
    print(f"{reader}: {STATISTICS}")


def fuzz(reader: str) -> None:
    corpus = Path(f"fuzz-seeds-{reader}")
    corpus.mkdir(exist_ok=True)
    for number, seed in enumerate(seeds(reader)):
        (corpus / f"seed{number}").write_bytes(seed)
    atheris.Setup([*sys.argv, str(corpus)], lambda data: check(data, reader))
    atheris.Fuzz()


def main() -> None:
    if len(sys.argv) < 2 or sys.argv[1] not in BEGINNINGS:
        sys.exit(__doc__)
    reader = sys.argv.pop(1)
    logging.getLogger("multifire").setLevel(logging.CRITICAL)
    read(BEGINNINGS[reader], reader, CHUNKS[0])  # what the first call alone imports is not its input's doing
    tracemalloc.start()
    inputs = [Path(word) for word in sys.argv[1:] if Path(word).is_file()]
    for path in inputs:
        check(path.read_bytes(), reader)
    if inputs:
        return
    if reader in NEED_A_FILE:
        damage(reader, dict(word.split("=", 1) for word in sys.argv[1:]))
    else:
        fuzz(reader)


if __name__ == "__main__":
    main()
