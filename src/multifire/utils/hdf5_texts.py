"""Texts of any length in HDF5 files, read without the library HDF5.

HDF5 2.0.0 never stops reading some damaged texts, and takes 4 GB of memory for others. So multifire reads each text
itself before HDF5 may. The bytes of a text lie in a heap. In its place the file holds a reference: the text's length,
the address of the heap, and the text's number in the heap. A file is refused if these do not agree.

Source: HDF5 File Format Specification, version 3.0: II.A superblock, III.E global heap, IV.A object headers, IV.A.2.m
attributes.
"""

import struct
from collections.abc import Iterator
from typing import BinaryIO

MAGIC = b"\x89HDF\r\n\x1a\n"
REFERENCE = struct.Struct("<IQI")  # bytes of the text, address of its heap, index in the heap
HEAP = struct.Struct("<4sB3xQ")  # GCOL, version, bytes of the heap with this header
OBJECT = struct.Struct("<H6xQ")  # index, 0 for the free space; bytes, which only for the free space include this header
ATTRIBUTE, CONTINUATION = 12, 16
"""Kinds of messages in an object's header."""
MAX_HEADER_BYTES = 1 << 20
"""Maximum size of an object's header, which may continue in other places; attributes above 64 KB lie elsewhere."""


class Texts:
    """The texts of an open file."""

    def __init__(self, file: BinaryIO, name: str):
        """Find the superblock.

        Args:
            file: a file that can seek; its position changes.
            name: names the file in messages.

        Raises:
            ValueError: no HDF5 file whose addresses and lengths have 8 bytes.
        """
        self._file, self._name = file, name
        self._end = self._unread = file.seek(0, 2)
        self._base = self._find_superblock()
        self._heaps: dict[int, dict[int, tuple[int, int]]] = {}

    def _find_superblock(self) -> int:
        """Return where the first superblock lies: at byte 0, 512, 1024, 2048, ..."""
        self._base = at = 0
        while at < self._end:
            head = self._read(at, min(16, self._end - at))
            if head.startswith(MAGIC) and len(head) == 16:
                if (head[13:15] if head[8] < 2 else head[9:11]) != b"\x08\x08":
                    raise ValueError(f"{self._name}: an HDF5 file whose lengths do not have 8 bytes is not read")
                return at
            at = max(512, 2 * at)
        raise ValueError(f"{self._name}: damaged, or no HDF5 file")

    def at(self, address: int, count: int) -> Iterator[bytes]:
        """Yield the texts to which `count` references at an address, counted from the file's first byte, refer.

        Raises:
            ValueError: damaged.
        """
        references = self._read(address - self._base, REFERENCE.size * count)
        for start in range(0, len(references), REFERENCE.size):
            yield self._text(references[start : start + REFERENCE.size])

    def attribute(self, address: int, name: str) -> bytes | None:
        """Return an attribute, one text, of the object at an address; None if it is not in the object's header.

        Raises:
            ValueError: damaged.
        """
        for kind, message in self._messages(address):
            if kind == ATTRIBUTE and (data := _attribute_data(message, name.encode())) is not None:
                return self._text(data)
        return None

    def _text(self, reference: bytes) -> bytes:
        if len(reference) != REFERENCE.size:
            raise self._damaged()
        length, address, index = REFERENCE.unpack(reference)
        if length == 0 and address == 0:
            return b""
        if address not in self._heaps:
            self._heaps[address] = dict(self._heap(address))
        start, size = self._heaps[address].get(index, (0, -1))
        if size != length:
            raise self._damaged()
        return self._read(start, size)

    def _heap(self, address: int) -> Iterator[tuple[int, tuple[int, int]]]:
        """Yield index, address and bytes of the objects in a heap, which must fill it."""
        signature, version, size = HEAP.unpack(self._read(address, HEAP.size))
        self._unread -= size  # heaps do not overlap, so that reading all takes time in proportion to the file
        end = address + size
        if (signature, version) != (b"GCOL", 1) or self._unread < 0 or self._base + end > self._end:
            raise self._damaged()
        at = address + HEAP.size
        while at + OBJECT.size <= end:
            index, length = OBJECT.unpack(self._read(at, OBJECT.size))
            taken = length if index == 0 else OBJECT.size + (length + 7) // 8 * 8
            if taken < OBJECT.size:
                raise self._damaged()
            if index:
                yield index, (at + OBJECT.size, length)
            at += taken
        if at > end:
            raise self._damaged()

    def _messages(self, address: int) -> Iterator[tuple[int, bytes]]:
        """Yield kind and content of the messages in an object's header."""
        head = self._read(address, 16)
        if head.startswith(b"OHDR\2"):  # a block starts with a signature and ends with a checksum
            flags = head[5]
            start = 6 + (16 if flags & 32 else 0) + (4 if flags & 16 else 0)
            width = 1 << (flags & 3)
            length = int.from_bytes(self._read(address + start, width), "little")
            blocks, header, block_frame = [(address + start + width, length)], 6 if flags & 4 else 4, (4, 4)
        elif head.startswith(b"\1"):
            blocks, header, block_frame = [(address + 16, int.from_bytes(head[8:12], "little"))], 8, (0, 0)
        else:
            raise self._damaged()
        left = MAX_HEADER_BYTES
        for start, length in blocks:
            left -= max(length, 1)
            if left < 0:
                raise self._damaged()
            for kind, message in _split(self._read(start, length), header):
                if kind == CONTINUATION:
                    offset, size = struct.unpack("<QQ", message[:16].ljust(16, b"\0"))
                    blocks.append((offset + block_frame[0], size - sum(block_frame)))
                yield kind, message

    def _read(self, address: int, length: int) -> bytes:
        start = self._base + address
        if not (0 <= length <= self._end and 0 <= start <= self._end - length):
            raise self._damaged()
        self._file.seek(start)
        return self._file.read(length)

    def _damaged(self) -> ValueError:
        return ValueError(f"{self._name}: damaged: a text in it does not lie where the file says; use another file")


def _split(block: bytes, header: int) -> Iterator[tuple[int, bytes]]:
    """Yield kind and content of messages whose own headers have so many bytes."""
    at = 0
    while at + header <= len(block):
        kind = block[at] if header < 8 else int.from_bytes(block[at : at + 2], "little")
        size = int.from_bytes(block[at + 1 : at + 3] if header < 8 else block[at + 2 : at + 4], "little")
        yield kind, block[at + header : at + header + size]
        at += header + size


def _attribute_data(message: bytes, name: bytes) -> bytes | None:
    """Return the first bytes of an attribute's data; None if it has another name or an unknown version."""
    if message[:1] not in (b"\1", b"\2", b"\3") or len(message) < 8:
        return None
    version = message[0]
    sizes = struct.unpack("<HHH", message[2:8])  # of name, data type and data space
    start = 9 if version == 3 else 8
    if message[start : start + sizes[0]].rstrip(b"\0") != name:
        return None
    padded = [(size + 7) // 8 * 8 if version == 1 else size for size in sizes]
    return message[start + sum(padded) :][: REFERENCE.size]
