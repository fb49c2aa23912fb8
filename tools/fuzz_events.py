#!/usr/bin/env python3
"""Test the readers of recordings with random and damaged files (fuzzing).

usage: tools/fuzz_events.py READER [OPTION...] [FILE...]

READER is aedat2, davis, aedat3.1, nmnist, dat, evt2, evt3, text, npy, npz, mat, any, hdf5 or aedat4.

For all but hdf5 and aedat4, libFuzzer generates the files, guided by the branches of the code that they reach. OPTION
is an option of libFuzzer. Files that reach new branches are collected in ./fuzz-seeds-READER.

With the option -damage=1 valid files are damaged at random instead, which is ten times faster. OPTION is -runs=N or
-seed=N. This is the only way for hdf5 and aedat4, whose compiled libraries have branches that libFuzzer does not see.
Each AEDAT4 file is decoded in a process of its own with the limits of multifire.events.aedat4_process. The process is
forked, which is ten times faster than starting a new one.

With FILE, only these files are tested.

The run ends at the first failure and writes the file to ./crash-*. A failure is one of:

- an exception other than ValueError;
- more than one second of computing time; for aedat4 the time to decode a small valid file is subtracted first;
- more memory at any time than 10 × the size of the file plus a constant (see MEMORY_ALLOWANCE), as measured by
  tracemalloc, which includes NumPy arrays; files that are damaged at random may take 64 MB, as Linux measures the
  resident memory; the limits of the decoding process apply in addition;
- events that are out of order or have negative coordinates, or frames that do not count every event;
- events that depend on the number of bytes that are read at a time.

It needs an installed multifire with the extra `cameras`, and atheris:

    pip install atheris
    for reader in aedat2 davis aedat3.1 nmnist dat evt2 evt3 text npy npz mat any; do
        python tools/fuzz_events.py $reader -runs=100000 -max_len=512
    done
    for reader in hdf5 aedat4; do python tools/fuzz_events.py $reader -runs=100000; done
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
from fuzz_limits import in_batches  # pyright: ignore[reportMissingImports] - beside this file

with atheris.instrument_imports(include=["multifire.events"]):  # pyright: ignore[reportAttributeAccessIssue]
    from multifire.events import (
        aedat,
        aedat4,
        aedat4_process,
        arrays,
        evt,
        read_events,
        recording,
        text,
        to_frames,
    )

MAX_SECONDS = 1.0
"""Limit of computing time for a file."""
MAX_SECONDS_REPEATED = 5.0
"""Limit for a file that is repeated to REPEATED_BYTES; tracing branches and memory makes reading ten times slower."""
MEMORY_PER_BYTE = 10
"""Bytes of memory that each byte of the file may take."""
MEMORY_ALLOWANCE = {"aedat4": 1_000_000, "hdf5": 64 << 20, "npz": 64 << 20, "mat": 64 << 20, "any": 1 << 20}
MEMORY_ALLOWANCE["evt3"] = 64 << 20  # a byte holds up to six events
DEFAULT_MEMORY_ALLOWANCE = 256_000
"""Bytes of memory that a file of any size may take: its header, messages, and the arrays of one packet of a camera."""
REPEATED_BYTES = 1 << 20
"""Size to which some files are repeated, so that the memory allowance is small compared with the file."""
CHUNK_SIZES = (1 << 18, 120)
"""Numbers of bytes to read at a time; 120 is a multiple of both record sizes, five and eight bytes."""

HEADERS = {
    "aedat2": b"#!AER-DAT2.0\r\n",
    "davis": b"#!AER-DAT2.0\r\n# AEChip: eu.seebetter.ini.chips.davis.DAVIS240C\r\n",
    "aedat3.1": b"#!AER-DAT3.1\r\n#Source 1: DVS128\r\n#!END-HEADER\r\n",
    "nmnist": b"",
    "dat": b"% ",
    "evt2": b"% evt 2.0\n",
    "evt3": b"% evt 3.0\n",
    "text": b"",
    "npy": b"\x93NUMPY\x01\0",
    "npz": b"PK\3\4",
    "mat": b"MATLAB 5.0 MAT-file",
    "any": b"",
    "hdf5": b"\x89HDF\r\n\x1a\n",
    "aedat4": b"#!AER-DAT4.0\r\n",
}
WITHOUT_LIBFUZZER = ("aedat4", "hdf5")
"""Readers whose files are damaged at random."""
FILE_READERS = ("aedat4",)
"""Readers that need a file on disk; they decode it in a process of their own."""
SEEKING_READERS = ("npz", "hdf5", "any")
"""Readers of files that can seek: a slow pipe is refused, or told from others by its first bytes only."""


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
    recording.CHUNK_BYTES = aedat.CHUNK_BYTES = arrays.CHUNK_BYTES = chunk_bytes
    evt.CHUNK, text.CHUNK = min(chunk_bytes, 1 << 15), min(64 * chunk_bytes, 1 << 16)
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
    if count % 5000 == 0:
        print(f"{reader}: {', '.join(f'{name} {value:,}' for name, value in STATISTICS.items())}", flush=True)
    if reader not in FILE_READERS:
        slow = NamedFile if reader in SEEKING_READERS else SlowPipe
        if tracemalloc.is_tracing() or count % 8 == 0:
            check_same(events, read(data, reader, CHUNK_SIZES[1], slow))
        if body and count % 1000 == 0 and reader not in SEEKING_READERS:
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
    memory_before = 0
    if tracemalloc.is_tracing():
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
    """Replace subprocess.Popen in `aedat4` by a fork of this process, in which faery is already imported."""

    def __init__(self, command: list[Any], **_: Any):
        read_end, write_end = os.pipe()
        self.pid = os.fork()
        if not self.pid:
            tracemalloc.stop()
            os.dup2(write_end, 1)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            aedat4_process.main(str(command[-1]))
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
    davis = np.stack([y << 22 | x << 12 | p << 11, t], 1)
    davis[::5, 0] |= 1 << 31
    dat = np.stack([t, x | y << 14 | p << 28], 1).astype("<u4")
    dat_head = b"Data file containing CD events.\n% Version 2\n% Height 34\n% Width 34\n\x0c\x08"
    evt2 = np.stack([8 << 28 | t >> 6, p << 28 | (t & 63) << 22 | x << 11 | y], 1).astype("<u4")
    evt3 = np.stack([8 << 12 | t >> 12, 6 << 12 | t & 4095, y, 2 << 12 | p << 11 | x], 1).astype("<u2")
    vectors = np.stack([y, 3 << 12 | p << 11 | x, 4 << 12 | x * 7, 5 << 12 | y], 1).astype("<u2")
    rows = np.stack([t, x, y, p], 1).tolist()
    texts = [
        "".join(line.format(*row) for row in rows).encode()
        for line in ("{0} {1} {2} {3}\n", "{1},{2},{3},{0}\r\n", "{0}.5 {1} {2} {3}\n")
    ]
    table = np.zeros(24, [("t", "<i8"), ("x", "<u2"), ("y", "<u2"), ("p", "?")])
    table["t"], table["x"], table["y"], table["p"] = t, x, y, p
    floats = np.stack([t / 1e6, x, y, 2.0 * p - 1], 1)
    recordings = {
        "davis": [davis.astype(">u4").tobytes(), davis[::-1].astype(">u4").tobytes() + b"cut"],
        "dat": [dat_head + dat.tobytes(), dat_head.replace(b"\x0c", b"\0").replace(b"2", b"1") + dat[::-1].tobytes()],
        "evt2": [b"% geometry 34x34\n% end\n" + evt2.tobytes(), evt2[::-1].tobytes()],
        "evt3": [b"% end\n" + evt3.tobytes(), evt3.tobytes() + vectors.tobytes()],
        "text": [*texts, b"34 34\n" + texts[0], b"x,y,p,t\n" + texts[1], b"# t x y p\n" + texts[2]],
        "npy": [saved(np.save, table)[8:], saved(np.save, floats)[8:]],
        "npz": [
            saved(np.savez, t=t, x=x, y=y, p=p)[4:],
            saved(np.savez_compressed, events=table, height=34, width=34)[4:],
        ],
        "mat": mat_seeds(t, x, y, p),
        "aedat2": [b"# a\r\n" + aedat2.tobytes(), overflowing.tobytes(), aedat2[::-1].tobytes() + b"cut"],
        "aedat3.1": [
            b"".join([headers[0], aedat3.tobytes(), unused, other_packet, headers[1], aedat3[::-1].tobytes(), unused])
        ],
        "nmnist": [nmnist.tobytes(), with_overflow_marks.tobytes(), nmnist[::-1].tobytes() + b"cu"],
    }
    if reader == "any":
        return [HEADERS[format] + seed for format, of_format in recordings.items() for seed in of_format]
    if reader in recordings:
        return recordings[reader]
    return hdf5_seeds(table) if reader == "hdf5" else aedat4_seeds()


def saved(save: Any, *arrays: np.ndarray, **named: Any) -> bytes:
    """Return the content of a file that `save` writes."""
    content = io.BytesIO()
    save(content, *arrays, **named)
    return content.getvalue()


def mat_seeds(t: np.ndarray, x: np.ndarray, y: np.ndarray, p: np.ndarray) -> list[bytes]:
    """Return files of MATLAB without their magic number."""
    from make_event_archives import encode_mat

    columns = {"ts": t.astype("<f8"), "x": x.astype("<u2"), "y": y.astype("<u2"), "pol": p.astype("u1")}
    return [encode_mat(columns, compressed)[len(HEADERS["mat"]) :] for compressed in (False, True)]


def hdf5_seeds(table: np.ndarray) -> list[bytes]:
    """Return HDF5 files in the layouts of DSEC, Metavision and older tools, without their magic number."""
    import h5py

    files = []
    for layout in ("dsec", "metavision", "older"):
        content = io.BytesIO()
        with h5py.File(content, "w") as file:
            if layout == "metavision":
                file.create_dataset("CD/events", data=table, chunks=(8,), compression="gzip")
                file["CD/events"].attrs["geometry"] = "34x34"
            else:
                names = "txyp" if layout == "dsec" else ("ts", "xs", "ys", "ps")
                for name, column in zip(names, "txyp", strict=True):
                    file[f"events/{name}"] = table[column] / 1e6 if name == "ts" else table[column]
                file["t_offset"] = np.int64(51_000_000)
                file.attrs["sensor_resolution"] = (34, 34)
        files.append(content.getvalue().removeprefix(HEADERS["hdf5"]))
    return files


def aedat4_seeds() -> list[bytes]:
    """Return valid AEDAT4 files without the reader's header, written by faery."""
    import faery  # pyright: ignore[reportMissingImports] - in the extra `cameras`

    events: Any = np.zeros(9000, faery.EVENTS_DTYPE)
    rng = np.random.default_rng(0)
    events["t"], events["x"], events["y"] = np.arange(9000) * 40, rng.integers(0, 34, 9000), np.arange(9000) % 33
    files = []
    for compression in ("lz4", "zstd"):
        for count in (200, len(events)):
            path = SCRATCH_FILE.with_suffix(".aedat4")
            stream = faery.events_stream_from_array(events[:count], dimensions=(34, 34))
            stream.to_file(path, compression=(compression, 1))
            files.append(path.read_bytes().removeprefix(HEADERS["aedat4"]))
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
    aedat4.subprocess.Popen = ForkedProcess  # pyright: ignore[reportAttributeAccessIssue] - only in this process
    rng = np.random.default_rng(int(options.get("-seed", 0)))
    valid = seeds(reader)
    start = computing_seconds()
    assert isinstance(read(HEADERS[reader] + valid[0], reader, CHUNK_SIZES[0]), np.ndarray)
    START_UP_SECONDS[True] = computing_seconds() - start if reader in FILE_READERS else 0.0
    runs = range(int(options.get("-runs", 5000)))

    def checked(data: bytes) -> None:
        try:
            check(data, reader)
        except BaseException:
            crash = Path(f"crash-{reader}-{STATISTICS['read'] + STATISTICS['refused']}")
            crash.write_bytes(data)
            print(f"wrote the file that caused the failure to {crash}, without the header {HEADERS[reader]!r}")
            raise

    in_batches((damage(valid[number % len(valid)], rng) for number in runs), checked)
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
    for body in (b"", *seeds(reader)):
        read(HEADERS[reader] + body, reader, CHUNK_SIZES[0])  # the first calls import modules, which must not count
    files = [Path(argument) for argument in sys.argv[1:] if Path(argument).is_file()]
    if files or not (reader in WITHOUT_LIBFUZZER or "-damage=1" in sys.argv):
        tracemalloc.start()
    for path in files:
        check(path.read_bytes(), reader)
    if files:
        return
    options = dict(argument.split("=", 1) for argument in sys.argv[1:] if "=" in argument)
    if reader in WITHOUT_LIBFUZZER or "-damage" in options:
        fuzz_with_damage(reader, options)
    else:
        fuzz_with_libfuzzer(reader)


if __name__ == "__main__":
    main()
