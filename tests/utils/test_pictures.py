"""Encoded pictures show every pixel and every frame."""

import io

import numpy as np
import pytest
from PIL import Image

from multifire.utils import images

RNG = np.random.default_rng(0)
MADE = {
    "noise": RNG.integers(0, 256, (3, 90, 110), dtype=np.uint8),
    "flat": np.zeros((2, 300, 300), np.uint8),
    "sparse": (RNG.random((5, 64, 64)) < 0.05).astype(np.uint8) * 240,
    "single": RNG.integers(0, 256, (1, 7, 5), dtype=np.uint8),
    "pixel": np.full((2, 1, 1), 9, np.uint8),
}


@pytest.mark.parametrize("name", MADE)
@pytest.mark.parametrize("write", [images.encode_png, images.encode_gif])
def test_a_viewer_sees_every_pixel_of_every_frame(name, write):
    made = MADE[name]
    with Image.open(io.BytesIO(write(made, 50))) as image:
        shown = []
        for frame in range(getattr(image, "n_frames", 1)):
            image.seek(frame)
            shown.append(np.asarray(image.convert("RGB")))
    distinct = [0] + [i for i in range(1, len(made)) if not np.array_equal(made[i], made[i - 1])]
    assert len(shown) in (len(made), len(distinct))
    wanted = made if len(shown) == len(made) else made[distinct]
    assert np.array_equal(np.stack(shown), images.PALETTE[wanted])


def test_colours_tell_the_polarities_apart():
    counts = np.zeros((2, 2, 2), np.uint8)
    counts[0, 0, 0], counts[1, 0, 1], counts[:, 1, 0] = 9, 9, 9
    red, green, blue = images.PALETTE[images.paint(counts)].transpose(2, 0, 1)
    assert (red[0, 0], green[0, 0], blue[0, 0]) == (255, 0, 0)
    assert (red[0, 1], green[0, 1], blue[0, 1]) == (0, 0, 255)
    assert (red[1, 0], green[1, 0], blue[1, 0]) == (0, 0, 0)
    assert (red[1, 1], green[1, 1], blue[1, 1]) == (255, 255, 255)


def test_a_single_event_can_be_seen_beside_many():
    counts = np.zeros((2, 1, 2), np.uint8)
    counts[1] = 1, 200
    assert images.PALETTE[images.paint(counts)][0, 0].min() < 200


def test_another_ending_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"x\.bmp: ends in '\.bmp', expected \.gif or \.png"):
        images.save(tmp_path / "x.bmp", MADE["flat"], 50)
    assert not list(tmp_path.iterdir())


def test_a_sheet_keeps_its_rows():
    red, blue = np.full((3, 4), 15, np.uint8), np.full((3, 4), 240, np.uint8)
    sheet = images.tile([[red, blue], [blue]])
    assert sheet.shape == (9, 11)
    assert (sheet[1:4, 1:5] == 15).all()
    assert (sheet[5:8, 1:5] == 240).all()
    assert (sheet[5:8, 6:10] == 0).all()


@pytest.mark.parametrize("channels", [1, 3])
def test_a_photo_keeps_every_pixel(channels):
    image = np.random.default_rng(0).integers(0, 256, (channels, 5, 7), dtype=np.uint8)
    with Image.open(io.BytesIO(images.encode_photo(image))) as shown:
        seen = np.asarray(shown).reshape(5, 7, channels)
    assert np.array_equal(seen, image.transpose(1, 2, 0))
