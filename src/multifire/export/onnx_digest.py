"""The digest of an ONNX file, and reading its metadata without the onnx package.

An ONNX file is a protobuf message, and two messages in a row are one message whose lists are joined. So the digest of
all earlier bytes can be appended as one more metadata entry, the last bytes of the file.
"""

import hashlib
import io
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

METADATA = 14
"""The field of ModelProto that holds the metadata, pairs of text."""
MAX_TEXT_BYTES = 16 << 20
MAX_FIELDS = 10_000
"""Fields of one message; a model has a few dozen."""
_BEFORE_DIGEST = bytes([METADATA << 3 | 2, 74, 1 << 3 | 2, 6]) + b"digest" + bytes([2 << 3 | 2, 64])
_TAIL = len(_BEFORE_DIGEST) + 64


def append_digest(content: bytes) -> bytes:
    """Return the ONNX model with a digest over `content` among its metadata."""
    return content + _tail(hashlib.sha256(content))


def read_metadata(path: Path) -> dict[str, str]:
    """Check the digest of an ONNX file and return its metadata, without loading the whole file.

    Raises:
        ValueError: truncated, altered, another program's, or not an ONNX file.
    """
    with path.open("rb") as file:
        size = file.seek(0, io.SEEK_END)
        file.seek(max(0, size - _TAIL))
        tail = file.read()
        if not tail.startswith(_BEFORE_DIGEST):
            raise ValueError(f"{path}: no digest at its end: cut short, or not an ONNX file as multifire exports it")
        if tail != _tail(_hash(file, size - _TAIL)):
            raise ValueError(f"{path}: damaged: its content does not match its digest; use another one")
        try:
            return _metadata(file, size)
        except (ValueError, KeyError) as error:
            raise ValueError(f"{path}: not an ONNX file ({error})") from None


def _tail(sha: "hashlib._Hash") -> bytes:
    return _BEFORE_DIGEST + sha.hexdigest().encode()


def _hash(file: BinaryIO, left: int) -> "hashlib._Hash":
    sha = hashlib.sha256()
    file.seek(0)
    while left:
        piece = file.read(min(left, 1 << 20))
        sha.update(piece)
        left -= len(piece)
    return sha


def _metadata(file: BinaryIO, size: int) -> dict[str, str]:
    metadata, text = {}, 0
    for number, start, length in _fields(file, size):
        if number != METADATA:
            continue
        text += length
        if text > MAX_TEXT_BYTES:
            raise ValueError(f"more than {MAX_TEXT_BYTES >> 20} MB of metadata")
        file.seek(start)
        entry = file.read(length)
        pair = {n: entry[at : at + long].decode() for n, at, long in _fields(io.BytesIO(entry), length)}
        metadata[pair[1]] = pair[2]
    return metadata


def _fields(file: BinaryIO, size: int) -> Iterator[tuple[int, int, int]]:
    """Yield number, offset and length of each field of bytes in a message; skip other fields."""
    at = 0
    for _ in range(MAX_FIELDS):
        if at == size:
            return
        file.seek(at)
        tag = _varint(file)
        number, kind = tag >> 3, tag & 7
        if kind not in (0, 1, 2, 5):
            raise ValueError(f"a field of kind {kind}")
        length = {0: 0, 1: 8, 5: 4}[kind] if kind != 2 else _varint(file)
        if kind == 0:
            _varint(file)
        start = file.tell()
        at = start + length
        if at > size:
            raise ValueError("a field beyond its end")
        if kind == 2:
            yield number, start, length
    raise ValueError(f"more than {MAX_FIELDS:,} fields")


def _varint(file: BinaryIO) -> int:
    value = 0
    for shift in range(0, 70, 7):
        byte = file.read(1)
        if not byte:
            raise ValueError("a number is cut short")
        value |= (byte[0] & 127) << shift
        if byte[0] < 128:
            return value
    raise ValueError("a number of more than 64 bits")
