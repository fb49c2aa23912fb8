"""Reader of N-MNIST's recordings."""

from collections.abc import Iterator

import numpy as np

from multifire.events.recording import ByteStream, Packed, Packer

SENSOR = (34, 34)
RECORD = 5
CHUNK = 1 << 14  # bytes; events take more than ten times the memory of records
OVERFLOW_ROW = 240
OVERFLOW_US = 1 << 13


def looks_like_nmnist(head: bytes) -> bool:
    """Return True if the complete records at a file's beginning are valid N-MNIST records; there is no magic number."""
    records = np.frombuffer(head, np.uint8, len(head) - len(head) % RECORD).reshape(-1, RECORD)
    inside = (records[:, 0] < SENSOR[1]) & (records[:, 1] < SENSOR[0])
    in_order = not head.startswith((b"#", b"%")) and len(records) > 0
    return in_order and bool((inside | (records[:, 1] == OVERFLOW_ROW)).all())


def read_nmnist(stream: ByteStream, packer: Packer) -> Iterator[Packed]:
    """Yield the events of an N-MNIST recording.

    Five bytes each, big-endian: x [8 bits], y [8], p [1], time in µs [23]. A record with y = 240 is not an event: it
    adds 2¹³ µs to all later times.

    Source: G. Orchard et al., "Converting static image datasets to spiking neuromorphic datasets using saccades",
    2015, and the MATLAB functions that come with the data set.
    """
    marks = 0
    for _, data in stream.records(RECORD, CHUNK):
        x, y, high, middle, low = np.frombuffer(data, np.uint8).reshape(-1, RECORD).T
        t = (high & 0x7F).astype(np.int64)
        for byte in (middle, low):
            t <<= 8
            t |= byte
        mark = y == OVERFLOW_ROW
        if marks or mark.any():
            t += OVERFLOW_US * (marks + np.cumsum(mark))
            marks += int(np.count_nonzero(mark))
            x, y, high, t = x[~mark], y[~mark], high[~mark], t[~mark]
        yield packer.pack(t, x.astype(np.int32), y.astype(np.int32), high >> 7)
