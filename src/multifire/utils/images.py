"""Draw images and event frames as PNG, animated PNG and GIF."""

import io
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from multifire.utils.files import write_atomic

LEVELS = 16
"""Number of brightness levels of each polarity; colour number = 16 · ON + OFF."""
MIN_LEVEL = 4
"""Brightness level of a single event, high enough to be visible."""


def _palette() -> np.ndarray:
    """Return the RGB colours [256, 3]: white for no event, blue for ON, red for OFF, dark for both."""
    on, off = (level.ravel() / (LEVELS - 1) for level in np.mgrid[:LEVELS, :LEVELS])
    colours = np.stack([1 - on, 1 - np.maximum(on, off), 1 - off], axis=1)
    return np.rint(255 * colours).astype(np.uint8)


PALETTE = _palette()


def paint(counts: np.ndarray, brightest: float | None = None) -> np.ndarray:
    """Return the colour numbers [..., H, W] uint8 of event counts [..., 2, H, W]; all pictures share one scale.

    `brightest` is the count of the strongest colour (default: 98 % of the cells with events have no more).
    """
    if brightest is None:
        nonzero = counts[counts > 0]
        brightest = max(float(np.percentile(nonzero, 98)), 1.0) if nonzero.size else 1.0
    brightness = np.minimum(counts / brightest, 1.0)
    levels = np.where(counts > 0, np.rint(MIN_LEVEL + (LEVELS - 1 - MIN_LEVEL) * brightness), 0).astype(np.uint8)
    return LEVELS * levels[..., 1, :, :] + levels[..., 0, :, :]


def enlarge(pictures: np.ndarray, min_width: int) -> np.ndarray:
    """Return the pictures [..., H, W] with each pixel repeated until they are at least `min_width` pixels wide."""
    factor = max(-(-min_width // pictures.shape[-1]), 1)
    return pictures.repeat(factor, -1).repeat(factor, -2)


def tile(rows: list[list[np.ndarray]], gap: int = 1) -> np.ndarray:
    """Return one picture that shows pictures of equal size, a row for each list, with dark lines between them."""
    H, W = next(picture.shape for row in rows for picture in row)
    columns = max(map(len, rows))
    sheet = np.full((len(rows) * (H + gap) + gap, columns * (W + gap) + gap), LEVELS * LEVELS - 1, np.uint8)
    for i, row in enumerate(rows):
        for j in range(columns):
            top, left = gap + i * (H + gap), gap + j * (W + gap)
            sheet[top : top + H, left : left + W] = row[j] if j < len(row) else 0
    return sheet


def save(path: Path, pictures: np.ndarray, milliseconds: int) -> None:
    """Write pictures [frames, H, W] of colour numbers as an animated GIF or PNG, as the ending of the file says.

    Raises:
        ValueError: the file has another ending.
        FileNotFoundError: the folder of the file does not exist.
    """
    encoders = {".gif": encode_gif, ".png": encode_png}
    if path.suffix.lower() not in encoders:
        raise ValueError(f"{path}: ends in {path.suffix or 'nothing'!r}, expected .gif or .png")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path.parent}: no such folder; make it, or write elsewhere")
    write_atomic(path, encoders[path.suffix.lower()](pictures, milliseconds))


def encode_png(pictures: np.ndarray, milliseconds: int = 0) -> bytes:
    """Return a PNG of pictures [frames, H, W] of colour numbers, animated if there are several."""
    animation = {"save_all": True, "duration": milliseconds} if len(pictures) > 1 else {}
    return _encode(pictures, "PNG", optimize=True, **animation)


def encode_gif(pictures: np.ndarray, milliseconds: int) -> bytes:
    """Return an animated GIF, which repeats forever, of pictures [frames, H, W] of colour numbers."""
    return _encode(pictures, "GIF", save_all=True, loop=0, duration=max(milliseconds, 20), optimize=False)


def encode_photo(image: np.ndarray) -> bytes:
    """Return a PNG of an image [C, H, W] uint8: grey if C is 1, RGB if C is 3."""
    pixels = image[0] if len(image) == 1 else image.transpose(1, 2, 0)
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def _encode(pictures: np.ndarray, file_format: str, **options: Any) -> bytes:
    frames = []
    for picture in pictures:
        frame = Image.fromarray(np.ascontiguousarray(picture))
        frame.putpalette(PALETTE.tobytes())
        frames.append(frame)
    buffer = io.BytesIO()
    frames[0].save(buffer, file_format, append_images=frames[1:], **options)
    return buffer.getvalue()
