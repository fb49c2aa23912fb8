"""The check of HDF5 files that comes before the library HDF5 reads their texts."""

import struct
from collections.abc import Iterator
from typing import BinaryIO

MAGIC = b"\x89HDF\r\n\x1a\n"
HEAP = struct.Struct("<4sB3xQ")  # signature, version, bytes of the heap with this header
OBJECT = struct.Struct("<H6xQ")  # index, 0 for the free space; bytes, which only for the free space include this header
START = b"GCOL\x01"
PIECE = 1 << 22  # bytes that are searched at a time


def check_heaps(file: BinaryIO, name: str) -> None:
    """Check the global heaps of an HDF5 file, which hold its texts: HDF5 2.0.0 reads some damaged ones without end.

    Every place that starts like a heap is checked, whether the file refers to it or not. Heaps do not overlap, so that
    the time is proportional to the size of the file.

    Args:
        file: a file that can seek; its position changes.
        name: names the file in messages.

    Raises:
        ValueError: a damaged heap, or a file whose numbers do not have 8 bytes.

    Source: HDF5 File Format Specification, version 3.0, II.A "Superblock" and III.E "Global Heap".
    """
    end = file.seek(0, 2)
    if _bytes_of_lengths(file, end) != 8:
        raise ValueError(f"{name}: damaged, or no HDF5 file whose lengths have 8 bytes; use another file")
    free = 0
    for start in _starts(file):
        heap_end = _heap_end(file, start) if start >= free else None
        if heap_end is None or heap_end > end:
            raise ValueError(f"{name}: damaged: the heap of texts at byte {start:,} does not add up; use another file")
        free = heap_end


def _bytes_of_lengths(file: BinaryIO, end: int) -> int | None:
    """Return what the first superblock says, which may lie at byte 0, 512, 1024, 2048, ...; None if there is none."""
    at = 0
    while at < end:
        file.seek(at)
        head = file.read(16)
        if head.startswith(MAGIC) and len(head) == 16:
            return head[14] if head[8] < 2 else head[10]
        at = max(512, 2 * at)
    return None


def _starts(file: BinaryIO) -> Iterator[int]:
    """Yield the places that start like a heap."""
    offset = 0
    while True:
        file.seek(offset)
        piece = file.read(PIECE + len(START) - 1)
        at = piece.find(START)
        while at >= 0:
            yield offset + at
            at = piece.find(START, at + 1)
        if len(piece) < PIECE:
            return
        offset += PIECE


def _heap_end(file: BinaryIO, start: int) -> int | None:
    """Return where a heap ends; None if its objects do not fill it."""
    file.seek(start)
    header = file.read(HEAP.size)
    if len(header) < HEAP.size:
        return None
    end, at = start + HEAP.unpack(header)[2], start + HEAP.size
    while at + OBJECT.size <= end:
        file.seek(at)
        content = file.read(OBJECT.size)
        if len(content) < OBJECT.size:
            return None
        index, length = OBJECT.unpack(content)
        taken = length if index == 0 else OBJECT.size + (length + 7) // 8 * 8
        if taken < OBJECT.size:
            return None
        at += taken
    return end if at <= end else None
