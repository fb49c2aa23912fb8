"""Hot pixels: the rule, and recordings without them."""

import zipfile
from pathlib import Path

import numpy as np
import pytest

from multifire.events import FrameOptions, frames_of_windows, open_recording, read_events
from multifire.events.hot_pixels import count_pixels, find_hot_pixels, hot_pixels
from tests.events.event_files import NamedBytes, encode_aedat2, events_of, random_events

NMNIST = Path(__file__).parents[3] / "shared" / "data" / "nmnist-1100.zip"


def hot(counts) -> list[tuple[int, int]]:
    return list(zip(*(index.tolist() for index in np.nonzero(hot_pixels(np.array(counts)))), strict=True))


def test_a_pixel_is_hot_above_ten_times_its_second_busiest_neighbour():
    around = np.full((5, 5), 3)
    for count, expected in ((30, []), (31, [(2, 2)])):
        around[2, 2] = count
        assert hot(around) == expected
    around[2, 3] = 29  # the busiest neighbour does not count
    assert hot(around) == [(2, 2)]
    around[1, 1] = 4  # the second busiest does
    assert hot(around) == []


def test_few_events_are_not_hot_and_edges_are_not_special():
    assert hot([[10, 0], [0, 0]]) == []
    assert hot([[11, 0], [0, 0]]) == [(0, 0)]
    assert hot([[11]]) == [(0, 0)]


def test_thin_outlines_and_corners_are_not_hot():
    box = np.zeros((12, 12), int)
    box[2, 2:9] = box[8, 2:9] = box[2:9, 2] = box[2:9, 8] = 500
    assert hot(box) == []
    rows, columns = np.mgrid[:11, :11]
    assert hot(np.where(abs(rows - 5) + abs(columns - 5) == 4, 500, 0)) == []  # a diamond


def test_two_hot_neighbours_are_found():
    counts = np.ones((6, 6), int)
    counts[2, 2:4] = 300
    assert hot(counts) == [(2, 2), (2, 3)]


def recording_with_hot_pixels() -> tuple[np.ndarray, np.ndarray]:
    """Return events of a camera, and those without the pixels (column 9, row 4) and (100, 90)."""
    plain = random_events(3000, last_us=400_000)
    hot_events = events_of([(t, *pixel, t % 2) for t in range(5, 400_000, 2001) for pixel in ((9, 4), (100, 90))])
    both = np.concatenate([plain, hot_events])
    both = both[np.argsort(both["t"], kind="stable")]
    is_hot = ((both["x"] == 9) & (both["y"] == 4)) | ((both["x"] == 100) & (both["y"] == 90))
    return both, both[~is_hot]


def test_hot_pixels_are_named_and_left_out_of_frames(caplog):
    both, without = recording_with_hot_pixels()
    with open_recording(NamedBytes(encode_aedat2(both))) as recording:
        counts = count_pixels(recording)
    assert counts.sum() == len(both)
    assert hot(counts) == [(4, 9), (90, 100)]
    for slicing in ("duration", "time", "count"):
        options = FrameOptions(slicing=slicing, timesteps=7, duration_us=50_000)
        frames = frames_of_windows(lambda: open_recording(NamedBytes(encode_aedat2(without))), [(None, None)], options)
        with caplog.at_level("INFO", logger="multifire"):
            dropped = frames_of_windows(
                lambda: open_recording(NamedBytes(encode_aedat2(both))),
                [(None, None)],
                FrameOptions(slicing=slicing, timesteps=7, duration_us=50_000, hot_pixels="drop"),
            )
        assert np.array_equal(dropped[0].counts, frames[0].counts)
        assert dropped[0][1:] == frames[0][1:]
        assert "leaves out 2 hot pixels" in caplog.text


def test_without_a_size_hot_pixels_cannot_be_told():
    with (
        open_recording(NamedBytes(b"t,x,y,p\n1,1,1,1\n")) as recording,
        pytest.raises(ValueError, match="does not state its sensor's size; give it with --sensor"),
    ):
        find_hot_pixels(recording)


@pytest.mark.skipif(not NMNIST.is_file(), reason="the sample of N-MNIST is not here")
def test_real_hot_pixels_are_the_same_in_many_recordings():
    """The camera of N-MNIST has hot pixels, for example that of column 18, row 30."""
    found = np.zeros((34, 34), int)
    with zipfile.ZipFile(NMNIST) as archive:
        names = [name for name in archive.namelist() if name.endswith(".bin")][:300]
        for name in names:
            events = read_events(NamedBytes(archive.read(name), name))
            counts = np.zeros((34, 34), int)
            np.add.at(counts, (events["y"], events["x"]), 1)
            found += hot_pixels(counts)
    assert found[30, 18] > 50
    assert np.count_nonzero(found) <= 5
