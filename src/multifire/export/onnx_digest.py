"""Append a digest to an ONNX file, and read its metadata without the onnx package.

An ONNX file is a protobuf message. Two messages in a row are read as one message whose lists are joined, so the digest
of all earlier bytes can be appended as one more metadata entry: the last bytes of the file.
"""

import hashlib
import io
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

METADATA = 14
"""Number of ModelProto's field for metadata, pairs of text."""
MAX_TEXT_BYTES = 16 << 20
"""Maximum size of the metadata."""
MAX_FIELDS = 10_000
"""Maximum number of fields of a message; a model has a few dozen."""
_BEFORE_DIGEST = bytes([METADATA << 3 | 2, 74, 1 << 3 | 2, 6]) + b"digest" + bytes([2 << 3 | 2, 64])
_TAIL = len(_BEFORE_DIGEST) + 64


def append_digest(content: bytes) -> bytes:
    """Return the bytes of an ONNX model with their SHA-256 appended as a metadata entry."""
    return content + _tail(hashlib.sha256(content))


def read_metadata(path: Path) -> dict[str, str]:
    """Check the digest of an ONNX file and return its metadata, without loading the whole file into memory.

    Raises:
        ValueError: truncated, altered, written by another program, or not an ONNX file.
    """
    with path.open("rb") as file:
        size = file.seek(0, io.SEEK_END)
        file.seek(max(0, size - _TAIL))
        tail = file.read()
        if not tail.startswith(_BEFORE_DIGEST):
            raise ValueError(f"{path}: no digest at its end: cut short, or not an ONNX file that multifire exported")
        if tail != _tail(_hash(file, size - _TAIL)):
            raise ValueError(f"{path}: damaged: its content does not match its digest; use another one")
        try:
            return _metadata(file, size)
        except (ValueError, KeyError) as error:
            raise ValueError(f"{path}: not an ONNX file ({error})") from None


def _tail(sha: "hashlib._Hash") -> bytes:
    return _BEFORE_DIGEST + sha.hexdigest().encode()


def _hash(file: BinaryIO, size: int) -> "hashlib._Hash":
    """Return the SHA-256 of the first `size` bytes."""
    sha, remaining = hashlib.sha256(), size
    file.seek(0)
    while remaining:
        block = file.read(min(remaining, 1 << 20))
        sha.update(block)
        remaining -= len(block)
    return sha


def _metadata(file: BinaryIO, size: int) -> dict[str, str]:
    metadata, text_bytes = {}, 0
    for number, start, length in _fields(file, size):
        if number != METADATA:
            continue
        text_bytes += length
        if text_bytes > MAX_TEXT_BYTES:
            raise ValueError(f"more than {MAX_TEXT_BYTES >> 20} MB of metadata")
        file.seek(start)
        entry = file.read(length)
        pair = {key: entry[at : at + count].decode() for key, at, count in _fields(io.BytesIO(entry), length)}
        metadata[pair[1]] = pair[2]
    return metadata


def _fields(file: BinaryIO, size: int) -> Iterator[tuple[int, int, int]]:
    """Yield number, offset and length of each length-delimited field of a message; skip other fields."""
    end = 0
    for _ in range(MAX_FIELDS):
        if end == size:
            return
        file.seek(end)
        tag = _varint(file)
        number, kind = tag >> 3, tag & 7
        if kind not in (0, 1, 2, 5):
            raise ValueError(f"a field of kind {kind}")
        length = {0: 0, 1: 8, 5: 4}[kind] if kind != 2 else _varint(file)
        if kind == 0:
            _varint(file)
        start = file.tell()
        end = start + length
        if end > size:
            raise ValueError("a field beyond its end")
        if kind == 2:
            yield number, start, length
    raise ValueError(f"more than {MAX_FIELDS:,} fields")


def _varint(file: BinaryIO) -> int:
    """Read an integer of protobuf: 7 bits in each byte, the lowest first."""
    value = 0
    for shift in range(0, 70, 7):
        byte = file.read(1)
        if not byte:
            raise ValueError("a number is cut short")
        value |= (byte[0] & 127) << shift
        if byte[0] < 128:
            return value
    raise ValueError("a number of more than 64 bits")
