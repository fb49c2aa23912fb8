#!/usr/bin/env python3
"""Test the readers of recordings with random and damaged files (fuzzing).

usage: tools/fuzz_events.py READER [OPTION...] [FILE...]

READER is aedat2, aedat3.1, nmnist, any, aedat4 or evt.

For aedat2, aedat3.1, nmnist and any, libFuzzer generates the files, guided by the branches of the code that they reach.
OPTION is an option of libFuzzer. Files that reach new branches are collected in ./fuzz-seeds-READER.

aedat4 and evt are decoded by a compiled library, and libFuzzer does not see its branches. Therefore valid files are
damaged at random instead. OPTION is -runs=N or -seed=N. Each file is decoded in a process of its own with the limits of
multifire.events.camera_process. The process is forked, which is ten times faster than starting a new one.

With FILE, only these files are tested.

The run ends at the first failure and writes the file to ./crash-*. A failure is one of:

- an exception other than ValueError;
- more than one second of computing time; for aedat4 and evt the time to decode a small valid file is subtracted first;
- more memory at any time than 10 × the size of the file plus a constant (see MEMORY_ALLOWANCE), as measured by
  tracemalloc, which includes NumPy arrays; the limits of the decoding process apply in addition;
- events that are out of order or have negative coordinates, or frames that do not count every event;
- events that depend on the number of bytes that are read at a time.

It needs an installed multifire and atheris; aedat4 and evt also need the extra `cameras`:

    pip install atheris
    for reader in aedat2 aedat3.1 nmnist any; do python tools/fuzz_events.py $reader -runs=60000 -max_len=512; done
    for reader in aedat4 evt; do python tools/fuzz_events.py $reader -runs=5000; done
    python tools/fuzz_events.py nmnist crash-0123abcd            # test this file only
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

import atheris  # pyright: ignore[reportMissingImports, reportMissingModuleSource] - installed by hand, see above
import numpy as np

with atheris.instrument_imports(include=["multifire.events"]):  # pyright: ignore[reportAttributeAccessIssue]
    from multifire.events import aedat, camera_process, cameras, read_events, recording, to_frames

MAX_SECONDS = 1.0
"""Limit of computing time for a file."""
MAX_SECONDS_REPEATED = 5.0
"""Limit for a file that is repeated to REPEATED_BYTES; tracing branches and memory makes reading ten times slower."""
MEMORY_PER_BYTE = 10
"""Bytes of memory that each byte of the file may take."""
MEMORY_ALLOWANCE = {"aedat4": 1_000_000, "evt": 1_000_000}
DEFAULT_MEMORY_ALLOWANCE = 64_000
"""Bytes of memory that a file of any size may take: its header, messages, and the arrays of one packet of a camera."""
REPEATED_BYTES = 1 << 20
"""Size to which some files are repeated, so that the memory allowance is small compared with the file."""
CHUNK_SIZES = (1 << 18, 120)
"""Numbers of bytes to read at a time; 120 is a multiple of both record sizes, five and eight bytes."""

HEADERS = {
    "aedat2": b"#!AER-DAT2.0\r\n",
    "aedat3.1": b"#!AER-DAT3.1\r\n#Source 1: DVS128\r\n#!END-HEADER\r\n",
    "nmnist": b"",
    "any": b"",
    "aedat4": b"#!AER-DAT4.0\r\n",
    "evt": b"% evt ",
}
FILE_READERS = ("aedat4", "evt")
"""Readers that need a file on disk; they decode it in a process of their own."""


class NamedFile(io.BytesIO):
    """A file in memory with a name; N-MNIST files are recognised by the ending of their name."""

    name = "fuzz.bin"


class SlowPipe(NamedFile):
    """The same file as a slow pipe: it returns few bytes at a time and cannot seek."""

    def read(self, size: int | None = -1) -> bytes:
        return super().read(min(size or 0, 61))

    def seek(self, *_: int) -> int:
        raise io.UnsupportedOperation("seek")


SCRATCH_FILE = Path(tempfile.gettempdir()) / f"multifire-fuzz-{os.getpid()}.raw"


def read(data: bytes, reader: str, chunk_bytes: int, file_type: type[NamedFile] = NamedFile) -> np.ndarray | str:
    """Return the events, or the message of the ValueError."""
    recording.CHUNK_BYTES = aedat.CHUNK_BYTES = chunk_bytes
    try:
        if reader not in FILE_READERS:
            return read_events(file_type(data))
        SCRATCH_FILE.write_bytes(data)
        return read_events(SCRATCH_FILE)
    except ValueError as error:
        return str(error)


def check(body: bytes, reader: str) -> None:
    """Read a file that consists of the reader's header and `body`; raise an error if that is a failure."""
    data = HEADERS[reader] + body
    events = read_within_limits(data, reader)
    STATISTICS["read" if isinstance(events, np.ndarray) else "refused"] += 1
    count = STATISTICS["read"] + STATISTICS["refused"]
    if count % (500 if reader in FILE_READERS else 5000) == 0:
        print(f"{reader}: {', '.join(f'{name} {value:,}' for name, value in STATISTICS.items())}", flush=True)
    if reader not in FILE_READERS:
        check_same(events, read(data, reader, CHUNK_SIZES[1], SlowPipe))
        if body and count % 100 == 0:
            repeated = HEADERS[reader] + body * (REPEATED_BYTES // len(body))
            read_within_limits(repeated, reader, MAX_SECONDS_REPEATED)
            STATISTICS["repeated to 1 MB"] += 1
    if isinstance(events, np.ndarray):
        check_events(events)


STATISTICS = {"read": 0, "refused": 0, "repeated to 1 MB": 0, "most bytes beyond 10 × file": 0, "longest ms": 0}
"""Numbers of files that were read, refused and repeated, and the largest values of memory and time."""


def read_within_limits(data: bytes, reader: str, max_seconds: float = MAX_SECONDS) -> np.ndarray | str:
    """Read a file as `read` does; raise an error if it takes too much computing time or memory."""
    start = computing_seconds()
    tracemalloc.reset_peak()
    memory_before = tracemalloc.get_traced_memory()[0]
    events = read(data, reader, CHUNK_SIZES[0])
    excess = tracemalloc.get_traced_memory()[1] - memory_before - MEMORY_PER_BYTE * len(data)
    seconds = computing_seconds() - start - START_UP_SECONDS[reader in FILE_READERS]
    assert seconds < max_seconds, f"took {seconds:.2f} s for {len(data):,} bytes, expected less than {max_seconds} s"
    allowance = MEMORY_ALLOWANCE.get(reader, DEFAULT_MEMORY_ALLOWANCE)
    assert excess <= allowance, (
        f"took {excess:,} bytes of memory more than {MEMORY_PER_BYTE} × {len(data):,}, expected at most {allowance:,}"
    )
    STATISTICS["most bytes beyond 10 × file"] = max(STATISTICS["most bytes beyond 10 × file"], excess)
    STATISTICS["longest ms"] = max(STATISTICS["longest ms"], int(1000 * seconds))
    return events


def computing_seconds() -> float:
    """Return the computing time of this process and its children; other load of the machine does not count."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + used.ru_utime + used.ru_stime


START_UP_SECONDS = [0.0, 0.0]
"""Seconds to subtract for readers in this process (none), and for readers in a process of their own."""


class ForkedProcess:
    """Replace subprocess.Popen in `cameras` by a fork of this process, in which faery is already imported."""

    def __init__(self, command: list[Any], **_: Any):
        read_end, write_end = os.pipe()
        self.pid = os.fork()
        if not self.pid:
            tracemalloc.stop()
            os.dup2(write_end, 1)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            camera_process.main(*map(str, command[-2:]))
        os.close(write_end)
        self.stdout = os.fdopen(read_end, "rb", buffering=0)
        self.returncode = None

    def wait(self) -> int:
        if self.returncode is None:
            self.returncode = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self.returncode

    def kill(self) -> None:
        if self.returncode is None:
            os.kill(self.pid, signal.SIGKILL)


def check_same(large_chunks: np.ndarray | str, small_chunks: np.ndarray | str) -> None:
    """Raise an error if the events, or the refusal of the file, depend on the number of bytes read at a time."""
    if isinstance(large_chunks, str):
        assert isinstance(small_chunks, str), f"the file is refused only if it is read in large chunks: {large_chunks}"
    else:
        assert not isinstance(small_chunks, str), (
            f"the file is refused only if it is read in small chunks: {small_chunks}"
        )
        assert np.array_equal(large_chunks, small_chunks), "the events depend on the number of bytes read at a time"


def check_events(events: np.ndarray) -> None:
    """Raise an error if there are no events, if they are out of order or negative, or if frames lose any."""
    assert len(events), "the reader returned no events and raised no error"
    assert (np.diff(events["t"]) >= 0).all(), "the events are not in order of time"
    assert min(events["x"].min(), events["y"].min(), events["t"].min()) >= 0, "a coordinate or time is negative"
    size = (int(events["y"].max()) + 1, int(events["x"].max()) + 1)
    if max(size) > 1024:
        return  # a table of the pixels of such a sensor would take more memory than the file may take
    slicing = ("duration", "time", "count")[len(events) % 3]
    counted = int(to_frames(events, size, (2, 3), 1000, 5, slicing=slicing).sum())
    within = events["t"] - events["t"][0] < 5000 if slicing == "duration" else events["t"] >= 0
    assert counted == np.count_nonzero(within), f"the frames count {counted} of {np.count_nonzero(within)} events"


def seeds(reader: str) -> list[bytes]:
    """Return some valid recordings without the reader's header, from which fuzzing starts."""
    rng = np.random.default_rng(0)
    t = np.sort(rng.integers(0, 1 << 20, 24))
    x, y, p = rng.integers(0, 34, 24), rng.integers(0, 34, 24), rng.integers(0, 2, 24)
    aedat2 = np.stack([y << 8 | (127 - x) << 1 | p, t], 1).astype(">u4")
    aedat3 = np.stack([x << 17 | y << 2 | p << 1 | 1, t], 1).astype("<u4")
    overflowing = aedat2.copy()  # the counter of the time stamps overflows after twelve events
    overflowing[12:, 1] = 5
    overflowing[:12, 1] = 0xFFFFFFF0
    nmnist = np.stack([x, y, p << 7 | t >> 16, t >> 8 & 255, t & 255], 1).astype(np.uint8)
    with_overflow_marks = nmnist.copy()
    with_overflow_marks[5::7, 1] = 240
    headers = [np.array([1 | 1 << 16, 8, 4, overflow, 30, 24, 24], "<u4").tobytes() for overflow in (0, 1)]
    unused = np.zeros(12, "<u4").tobytes()  # a packet has capacity for 30 events and holds 24
    other_packet = np.array([3 | 1 << 16, 12, 4, 0, 1, 1, 1, 7, 7, 7], "<u4").tobytes()
    recordings = {
        "aedat2": [b"# a\r\n" + aedat2.tobytes(), overflowing.tobytes(), aedat2[::-1].tobytes() + b"cut"],
        "aedat3.1": [
            b"".join([headers[0], aedat3.tobytes(), unused, other_packet, headers[1], aedat3[::-1].tobytes(), unused])
        ],
        "nmnist": [nmnist.tobytes(), with_overflow_marks.tobytes(), nmnist[::-1].tobytes() + b"cu"],
    }
    if reader == "any":
        return [HEADERS[format] + seed for format, of_format in recordings.items() for seed in of_format]
    return recordings[reader] if reader in recordings else camera_seeds(reader)


def camera_seeds(reader: str) -> list[bytes]:
    """Return valid AEDAT4 or EVT files without the reader's header, written by faery."""
    import faery  # pyright: ignore[reportMissingImports] - in the extra `cameras`

    events: Any = np.zeros(9000, faery.EVENTS_DTYPE)
    rng = np.random.default_rng(0)
    events["t"], events["x"], events["y"] = np.arange(9000) * 40, rng.integers(0, 34, 9000), np.arange(9000) % 33
    suffixes_and_options: list[Any] = [("raw", {"version": "evt2"}), ("raw", {"version": "evt3"})]
    if reader == "aedat4":
        suffixes_and_options = [("aedat4", {"compression": (name, 1)}) for name in ("lz4", "zstd")]
    files = []
    for suffix, options in suffixes_and_options:
        for count in (200, len(events)):
            path = SCRATCH_FILE.with_suffix(f".{suffix}")
            faery.events_stream_from_array(events[:count], dimensions=(34, 34)).to_file(path, **options)
            files.append(path.read_bytes().removeprefix(HEADERS[reader]))
            path.unlink()
    return files


def damage(data: bytes, rng: np.random.Generator) -> bytes:
    """Return the data with one to three random changes, which occur more often near the beginning.

    A change deletes or repeats some bytes, cuts the end off, or overwrites four bytes with a number or one byte.
    """
    changed = bytearray(data)
    for _ in range(rng.integers(1, 4)):
        offset = int(len(changed) * rng.random() ** rng.choice([1, 1, 1, 6]))
        match rng.integers(8):
            case 0:
                del changed[offset : offset + int(rng.integers(1, 200))]
            case 1:
                changed[offset:offset] = changed[offset : offset + int(rng.integers(1, 200))]
            case 2:
                del changed[max(offset, 20) :]
            case 3 | 4:
                number = int(rng.choice([0, 1, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 0x10000000]))
                changed[offset : offset + 4] = number.to_bytes(4, "little")
            case _:
                changed[offset : offset + 1] = bytes([rng.integers(256)])
    return bytes(changed)


def fuzz_with_damage(reader: str, options: dict[str, str]) -> None:
    """Test the reader with valid files that are damaged at random."""
    cameras.subprocess.Popen = ForkedProcess  # pyright: ignore[reportAttributeAccessIssue] - only in this process
    rng = np.random.default_rng(int(options.get("-seed", 0)))
    valid = seeds(reader)
    start = computing_seconds()
    assert isinstance(read(HEADERS[reader] + valid[0], reader, CHUNK_SIZES[0]), np.ndarray)
    START_UP_SECONDS[True] = computing_seconds() - start
    for number in range(int(options.get("-runs", 5000))):
        data = damage(valid[number % len(valid)], rng)
        try:
            check(data, reader)
        except BaseException:
            crash = Path(f"crash-{reader}-{number}")
            crash.write_bytes(data)
            print(f"wrote the file that caused the failure to {crash}, without the header {HEADERS[reader]!r}")
            raise
    print(f"{reader}: {STATISTICS}")


def fuzz_with_libfuzzer(reader: str) -> None:
    """Test the reader with files that libFuzzer generates."""
    corpus = Path(f"fuzz-seeds-{reader}")
    corpus.mkdir(exist_ok=True)
    for number, seed in enumerate(seeds(reader)):
        (corpus / f"seed{number}").write_bytes(seed)
    atheris.Setup([*sys.argv, str(corpus)], lambda data: check(data, reader))
    atheris.Fuzz()


def main() -> None:
    if len(sys.argv) < 2 or sys.argv[1] not in HEADERS:
        sys.exit(__doc__)
    reader = sys.argv.pop(1)
    logging.getLogger("multifire").setLevel(logging.CRITICAL)
    read(HEADERS[reader], reader, CHUNK_SIZES[0])  # the first call imports modules, which must not count
    tracemalloc.start()
    files = [Path(argument) for argument in sys.argv[1:] if Path(argument).is_file()]
    for path in files:
        check(path.read_bytes(), reader)
    if files:
        return
    if reader in FILE_READERS:
        fuzz_with_damage(reader, dict(argument.split("=", 1) for argument in sys.argv[1:]))
    else:
        fuzz_with_libfuzzer(reader)


if __name__ == "__main__":
    main()
