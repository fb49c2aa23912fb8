"""Show a recording as it was: pictures of equal time, the rates of both polarities, a page with a time slider."""

import base64
import html
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from multifire.events.frames import FrameOptions
from multifire.events.hot_pixels import hot_pixels
from multifire.events.overview import Overview
from multifire.events.recording import Recording
from multifire.events.slices import slices_of
from multifire.utils import images
from multifire.utils.files import write_atomic

MAX_PICTURES, TERMINAL_PICTURES = 500, 1000
MAX_SIZE = (256, 320)
"""Maximum height and width of a picture; together with the number of pictures they bound the memory."""
MIN_WIDTH = 320
"""Minimum width of an animation in pixels."""
SLOWEST_S = 60.0
"""Maximum time for a picture: a clock that was set meanwhile makes a recording last decades."""
SLOWEST_MS = 655_350 // MAX_PICTURES
"""The same in an animation: a GIF shows equal pictures as one, for at most 655 s."""
BRIGHT_SHARE = 0.98
"""Share of the cells with events that are not shown in the strongest colour."""
PAGE = Path(__file__).with_name("play.html")


class Film(NamedTuple):
    """A recording as pictures."""

    pictures: np.ndarray
    """Colour numbers uint8 [T, H, W] of `images.PALETTE`: blue for ON, red for OFF."""
    rates: np.ndarray
    """Events per second of each picture, [T, 2]: OFF, then ON."""
    slice_us: float
    """Time that a picture covers, µs."""
    speed: float
    first_us: int

    @property
    def seconds_each(self) -> float:
        """Time for which a picture is shown, at most SLOWEST_S."""
        return min(self.slice_us / 1e6 / self.speed, SLOWEST_S)

    def say(self) -> str:
        return f"{len(self.pictures):,} pictures of {self.slice_us / 1000:,.1f} ms; blue: ON, red: OFF"


def film(
    factory: Callable[[], Recording],
    overview: Overview,
    *,
    fps: float = 30.0,
    speed: float = 1.0,
    size: tuple[int, int] = MAX_SIZE,
    pictures: int = MAX_PICTURES,
    flip_x: bool = False,
    flip_y: bool = False,
    drop_hot_pixels: bool = False,
) -> Film:
    """Paint a recording, of which `overview` is known, with `fps` pictures for each second in which it is shown.

    A long recording has at most `pictures`, each of more time. A picture is a whole fraction of the sensor's size, and
    fits into `size` (H, W).

    Raises:
        ValueError: a damaged recording, an unknown sensor size, or fps or speed not above 0.
    """
    if not (0 < fps < math.inf and 0 < speed < math.inf):
        raise ValueError(f"fps {fps:g} and speed {speed:g} must be numbers above 0")
    span = overview.last_us - overview.first_us + 1
    slice_us = max(1e6 / fps * speed, span / pictures, 1.0)
    height, width = overview.sensor_size or (1, 1)
    factor = max(-(-height // size[0]), -(-width // size[1]), 1)
    options = FrameOptions((-(-height // factor), -(-width // factor)), factor=factor, flip_x=flip_x, flip_y=flip_y)
    with factory() as recording:
        recording.quiet = True
        if drop_hot_pixels:
            recording.drop_pixels(hot_pixels(overview.pixel_counts))
        cut = slices_of(recording, options, overview.first_us, slice_us)
        counts = [np.minimum(counts_2HW, 255).astype(np.uint8) for counts_2HW in cut]
    rates = np.array([piece.sum((1, 2), dtype=np.int64) for piece in counts]) / (slice_us / 1e6)
    brightest = _brightest(counts)
    return Film(
        np.stack([images.paint(piece, brightest) for piece in counts]), rates, slice_us, speed, overview.first_us
    )


def _brightest(counts: list[np.ndarray]) -> float:
    """Return the number of events that BRIGHT_SHARE of the cells with events do not exceed."""
    cells = sum((np.bincount(piece.ravel(), minlength=256) for piece in counts), np.zeros(256, np.int64))[1:]
    return float(np.searchsorted(np.cumsum(cells), BRIGHT_SHARE * cells.sum()) + 1)


def write_film(out: Path, shown: Film, name: str) -> None:
    """Write a page with a time slider (.html) or an animation (.png, .gif); `name` is the page's title.

    Raises:
        ValueError: the file has another ending.
        FileNotFoundError: the folder of the file does not exist.
    """
    if out.suffix.lower() in (".png", ".gif"):
        images.save(
            out, images.enlarge(shown.pictures, MIN_WIDTH), min(max(round(1000 * shown.seconds_each), 20), SLOWEST_MS)
        )
        return
    if out.suffix.lower() not in (".html", ".htm"):
        raise ValueError(f"{out}: ends in {out.suffix or 'nothing'!r}, expected .html, .png or .gif")
    if not out.parent.is_dir():
        raise FileNotFoundError(f"{out.parent}: no such folder; make it, or write elsewhere")
    write_atomic(out, page(shown, name).encode())


def page(shown: Film, name: str) -> str:
    """Return a page without external resources that plays the pictures."""
    data = {
        "pictures": [base64.b64encode(images.encode_png(picture[None])).decode() for picture in shown.pictures],
        "rates": shown.rates.round().astype(int).tolist(),
        "slice_us": shown.slice_us,
        "milliseconds": 1000 * shown.seconds_each,
        "first_us": shown.first_us,
    }
    height, width = shown.pictures.shape[1:]
    scale = max(MIN_WIDTH * 2 // width, 1)
    texts = {
        "NAME": html.escape(name),
        "ABOUT": html.escape(shown.say()),
        "DATA": json.dumps(data).replace("<", "\\u003c"),
    }
    text = (
        PAGE.read_text(encoding="utf-8").replace("{WIDTH}", str(width * scale)).replace("{HEIGHT}", str(height * scale))
    )
    for key, value in texts.items():
        text = text.replace(f"{{{key}}}", value)
    return text
