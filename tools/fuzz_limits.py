"""Limits of memory for the fuzzers: the peak of this process's resident memory, as Linux counts it."""

import contextlib
import resource
from collections.abc import Callable, Iterator
from pathlib import Path

MEMORY_PER_BYTE, MEMORY_ALLOWANCE = 10, 64 << 20
"""Bytes of memory that each byte of a file, and a file of any size, may take."""
BATCH = 64


def reset_peak() -> None:
    """Let the system count the peak of resident memory anew."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_bytes() -> int:
    with contextlib.suppress(OSError):
        status = Path("/proc/self/status").read_text()
        return 1024 * int(status.partition("VmHWM:")[2].split()[0])
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def in_batches(inputs: Iterator[bytes], check: Callable[[bytes], None]) -> None:
    """Call `check` on each input; measure memory over BATCH inputs, and over each of them if that was too much.

    Raises:
        AssertionError: an input takes more memory than it may.
    """
    batch: list[bytes] = []
    for data in inputs:
        batch.append(data)
        if len(batch) == BATCH:
            _check_batch(batch, check)
            batch = []
    _check_batch(batch, check)


def _check_batch(batch: list[bytes], check: Callable[[bytes], None]) -> None:
    reset_peak()
    before = peak_bytes()
    for data in batch:
        check(data)
    if peak_bytes() - before <= MEMORY_ALLOWANCE:
        return
    for data in batch:
        reset_peak()
        before = peak_bytes()
        check(data)
        grown, allowed = peak_bytes() - before, MEMORY_PER_BYTE * len(data) + MEMORY_ALLOWANCE
        if grown > allowed:
            error = AssertionError(f"took {grown:,} bytes of memory for {len(data):,}, expected at most {allowed:,}")
            error.data = data  # pyright: ignore[reportAttributeAccessIssue] - the input to keep
            raise error
