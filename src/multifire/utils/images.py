"""Pictures of event frames, as PNG, animated PNG and GIF.

Written with zlib and sixty lines of LZW rather than with Pillow: 256 colours are all that frames need, the formats have
been fixed for decades, and a dependency would have to be kept current for the sake of two commands.
"""

import struct
import zlib
from pathlib import Path

import numpy as np

from multifire.utils.files import write_atomic

LEVELS = 16
"""Brightness steps of each polarity; colour number = 16 · ON + OFF."""
FAINTEST = 4
"""What a single event is drawn with, so that it can be seen."""
PNG = b"\x89PNG\r\n\x1a\n"


def _palette() -> np.ndarray:
    """RGB [256, 3]: no event is white, ON is blue, OFF is red, both are dark."""
    on, off = (level.ravel() / (LEVELS - 1) for level in np.mgrid[:LEVELS, :LEVELS])
    colours = np.stack([1 - on, 1 - np.maximum(on, off), 1 - off], axis=1)
    return np.rint(255 * colours).astype(np.uint8)


PALETTE = _palette()


def paint(counts: np.ndarray) -> np.ndarray:
    """Colour numbers [..., H, W] uint8 of counts [..., 2, H, W], all of them on one scale."""
    seen = counts[counts > 0]
    brightest = max(float(np.percentile(seen, 98)), 1.0) if seen.size else 1.0
    share = np.minimum(counts / brightest, 1.0)
    levels = np.where(counts > 0, np.rint(FAINTEST + (LEVELS - 1 - FAINTEST) * share), 0).astype(np.uint8)
    return LEVELS * levels[..., 1, :, :] + levels[..., 0, :, :]


def enlarge(pictures: np.ndarray, least: int) -> np.ndarray:
    """Each pixel repeated so that pictures [..., H, W] are at least so many pixels wide."""
    times = max(-(-least // pictures.shape[-1]), 1)
    return pictures.repeat(times, -1).repeat(times, -2)


def tile(rows: list[list[np.ndarray]], gap: int = 1) -> np.ndarray:
    """Pictures of one size side by side, a row for each list, with a line of dark pixels between them."""
    H, W = next(picture.shape for row in rows for picture in row)
    columns = max(map(len, rows))
    sheet = np.full((len(rows) * (H + gap) + gap, columns * (W + gap) + gap), LEVELS * LEVELS - 1, np.uint8)
    for i, row in enumerate(rows):
        for j in range(columns):
            top, left = gap + i * (H + gap), gap + j * (W + gap)
            sheet[top : top + H, left : left + W] = row[j] if j < len(row) else 0
    return sheet


def save(path: Path, pictures: np.ndarray, milliseconds: int) -> None:
    """Write pictures [frames, H, W] of colour numbers as an animated GIF or PNG, as the file's name ends.

    Raises:
        ValueError: it ends otherwise.
        FileNotFoundError: its folder is not there.
    """
    writers = {".gif": gif, ".png": png}
    if path.suffix.lower() not in writers:
        raise ValueError(f"{path}: ends in {path.suffix or 'nothing'!r}, expected .gif or .png")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path.parent}: no such folder; make it, or write elsewhere")
    write_atomic(path, writers[path.suffix.lower()](pictures, milliseconds))


def png(pictures: np.ndarray, milliseconds: int = 0) -> bytes:
    """A PNG with a palette, animated where there are several pictures [frames, H, W].

    Source: https://www.w3.org/TR/png-3/.
    """
    frames, H, W = pictures.shape
    chunks = [_chunk(b"IHDR", struct.pack(">IIBBBBB", W, H, 8, 3, 0, 0, 0)), _chunk(b"PLTE", PALETTE.tobytes())]
    if frames > 1:
        chunks.append(_chunk(b"acTL", struct.pack(">II", frames, 0)))
    number = 0
    for frame, picture in enumerate(pictures):
        lines = zlib.compress(np.pad(picture, ((0, 0), (1, 0))).tobytes(), 9)  # filter 0 before each line
        if frames > 1:
            control = struct.pack(">IIIIIHHBB", number, W, H, 0, 0, milliseconds, 1000, 0, 0)
            chunks.append(_chunk(b"fcTL", control))
            number += 1
        if frame == 0:
            chunks.append(_chunk(b"IDAT", lines))
        else:
            chunks.append(_chunk(b"fdAT", struct.pack(">I", number) + lines))
            number += 1
    return PNG + b"".join(chunks) + _chunk(b"IEND", b"")


def photo(image: np.ndarray) -> bytes:
    """A PNG of an image [C, H, W] uint8, grey where C is 1, else RGB."""
    C, H, W = image.shape
    header = struct.pack(">IIBBBBB", W, H, 8, {1: 0, 3: 2}[C], 0, 0, 0)
    lines = np.pad(image.transpose(1, 2, 0).reshape(H, W * C), ((0, 0), (1, 0)))  # filter 0 before each line
    chunks = [_chunk(b"IHDR", header), _chunk(b"IDAT", zlib.compress(lines.tobytes(), 9)), _chunk(b"IEND", b"")]
    return PNG + b"".join(chunks)


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def gif(pictures: np.ndarray, milliseconds: int) -> bytes:
    """A GIF that repeats without end, of pictures [frames, H, W].

    Source: https://www.w3.org/Graphics/GIF/spec-gif89a.txt.
    """
    H, W = pictures.shape[1:]
    parts = [
        b"GIF89a" + struct.pack("<HHBBB", W, H, 0xF7, 0, 0) + PALETTE.tobytes(),
        b"\x21\xff\x0bNETSCAPE2.0\x03\x01\x00\x00\x00",
    ]
    for picture in pictures:
        parts.append(b"\x21\xf9\x04" + struct.pack("<BHBB", 4, max(round(milliseconds / 10), 2), 0, 0))
        parts.append(b"\x2c" + struct.pack("<HHHHBB", 0, 0, W, H, 0, 8))
        codes = _lzw(picture.tobytes())
        parts += [bytes([len(block)]) + block for i in range(0, len(codes), 255) if (block := codes[i : i + 255])]
        parts.append(b"\0")
    return b"".join(parts) + b"\x3b"


def _lzw(pixels: bytes) -> bytes:
    """GIF's variable-width LZW codes of 8-bit pixels, packed from the lowest bit on."""
    clear, end = 256, 257
    packed, bits, filled = bytearray(), clear, 9
    table: dict[int, int] = {}
    width, free, prefix = 9, end + 1, pixels[0]
    for pixel in pixels[1:]:
        key = prefix << 8 | pixel
        known = table.get(key)
        if known is not None:
            prefix = known
            continue
        bits |= prefix << filled
        filled += width
        if free < 4096:
            if free == 1 << width:
                width += 1
            table[key] = free
            free += 1
        else:
            bits |= clear << filled
            filled += width
            table.clear()
            width, free = 9, end + 1
        prefix = pixel
        whole = filled // 8
        packed += (bits & ((1 << 8 * whole) - 1)).to_bytes(whole, "little")
        bits, filled = bits >> 8 * whole, filled % 8
    bits |= prefix << filled
    filled += width
    width += free == 1 << width and width < 12
    bits |= end << filled
    filled += width
    return bytes(packed) + bits.to_bytes(-(-filled // 8), "little")
