"""A program that decodes one AEDAT4 file, started by `aedat4.py`: aedat4_process.py FILE.

It imports nothing from multifire, limits its own memory and computing time, and writes messages to its output: a
letter, the payload's length (HEAD), the payload. FOUND holds the file's metadata (JSON), EVENTS at most AT_A_TIME
events, CUT means that the file ends within a packet, WRONG holds an error message, and END is the last message.
"""

import contextlib
import json
import os
import resource
import signal
import struct
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

HEAD = struct.Struct("<cI")
FOUND, EVENTS, CUT, WRONG, END = b"f", b"e", b"c", b"w", b"."
EVENT = np.dtype([("t", "<u8"), ("x", "<u2"), ("y", "<u2"), ("on", "u1")])
AT_A_TIME = 1 << 14
NONE = np.empty(0, EVENT)

MB = 1 << 20
PACKET_S = 1
FILE_S, MB_PER_S = 1, 1
"""Limits of computing time. A valid file takes 0.02 s for a MB (AEDAT4 on a busy EPYC of 2021)."""
MIN_BYTES, TIMES_FILE, MAX_BYTES = 64 * MB, 10, 1024 * MB
"""Limits of memory. A valid file takes the memory of a few packets, whatever its size."""

CUT_SHORT = "failed to fill whole buffer"  # Rust's message for a file that ends too early


def main(path: str) -> None:
    opened = False
    try:
        import faery  # pyright: ignore[reportMissingImports] - an extra

        bytes_ = Path(path).stat().st_size
        limit_memory(memory_for(bytes_))
        end = time.process_time() + FILE_S + bytes_ / (MB_PER_S * MB)
        limit_computing(end)
        found, packets = open_file(faery, path)
        send(FOUND, json.dumps(found).encode())
        opened = True
        while (events := next_of(packets, end)) is not None:
            for first in range(
                0, max(len(events), 1), AT_A_TIME
            ):  # also without events, so that the parent sees progress
                send(EVENTS, events[first : first + AT_A_TIME].tobytes())
    except BaseException as error:  # Rust's PanicException is not an Exception
        if opened and str(error) == CUT_SHORT:
            send(CUT)
        else:
            send(WRONG, what_of(error).encode(errors="replace"))
    send(END)
    os._exit(0)  # skips the library's clean-up, which may fail


def memory_for(file_bytes: int) -> int:
    return min(max(MIN_BYTES, TIMES_FILE * file_bytes), MAX_BYTES)


def limit_memory(most: int) -> None:
    """Limit the memory allocated from now on; beyond it this process ends, or raises MemoryError. No core file."""
    lower(resource.RLIMIT_CORE, 0)
    with contextlib.suppress(FileNotFoundError):  # only Linux reports the memory in use
        taken = int(Path("/proc/self/statm").read_text().split()[5]) * resource.getpagesize()
        lower(resource.RLIMIT_DATA, taken + most)


def lower(what: int, most: int) -> None:
    soft, hard = resource.getrlimit(what)
    bounds = [bound for bound in (soft, hard) if bound != resource.RLIM_INFINITY]
    resource.setrlimit(what, (min(most, *bounds) if bounds else most, hard))


def limit_computing(*ends: float) -> None:
    """End this process when its computing time reaches the first of these limits."""
    signal.setitimer(signal.ITIMER_PROF, max(min(ends) - time.process_time(), 1e-6))  # 0 would switch the timer off


def next_of(packets: Iterator[np.ndarray], end: float) -> np.ndarray | None:
    limit_computing(end, time.process_time() + PACKET_S)
    return next(packets, None)


def what_of(error: BaseException) -> str:
    if isinstance(error, ValueError):
        return str(error)
    what = "it ends within its head" if str(error) == CUT_SHORT else str(error) or type(error).__name__
    return f"cannot be read: {what}; the file is damaged or cut short"


def send(message: bytes, payload: bytes = b"") -> None:
    try:
        sys.stdout.buffer.write(HEAD.pack(message, len(payload)) + payload)
        sys.stdout.buffer.flush()
    except BrokenPipeError:  # the parent has closed the pipe
        os._exit(1)


def open_file(faery: Any, path: str) -> tuple[dict[str, Any], Iterator[np.ndarray]]:
    decoder = faery.aedat.Decoder(path)
    tracks = [track for track in decoder.tracks() if track.data_type == "events"]
    if len(tracks) != 1:
        raise ValueError(f"holds the events of {len(tracks)} cameras, expected one")
    packets = (packet if track.data_type == "events" else NONE for track, packet in decoder)
    return {"width_height": tracks[0].dimensions}, packets


if __name__ == "__main__":
    main(*sys.argv[1:])
