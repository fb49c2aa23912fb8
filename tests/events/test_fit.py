"""Frames of sensors that are not square, and turned ones."""

import numpy as np
import pytest

from multifire.events import FrameOptions, frames_of_windows, open_recording
from multifire.events.frames import fitted_size, say_fit
from multifire.events.live import LiveFrames
from tests.events.event_files import NamedBytes, encode_davis, sensor_events

EVENTS = sensor_events(346, 260, 4000)


def frame(**options) -> np.ndarray:
    """Return the one frame of the DAVIS346's events."""
    recording = NamedBytes(encode_davis(EVENTS, "DAVIS346"))
    given = FrameOptions(timesteps=1, slicing="time", **options)
    return frames_of_windows(lambda: open_recording(recording_again(recording)), [(None, None)], given)[0].counts[0]


def recording_again(recording: NamedBytes) -> NamedBytes:
    recording.seek(0)
    return recording


def expected(rows: np.ndarray, columns: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Count the events in cells; those whose row or column lies outside the frame are left out."""
    counts = np.zeros((2, *size), np.uint8)
    inside = (rows >= 0) & (rows < size[0]) & (columns >= 0) & (columns < size[1])
    np.add.at(counts, (EVENTS["p"][inside], rows[inside], columns[inside]), 1)
    return counts


x, y = EVENTS["x"].astype(int), EVENTS["y"].astype(int)


def test_padding_keeps_every_event_and_the_aspect():
    """346 × 260 in the middle of 346 × 346: 43 empty rows of pixels above and below."""
    made = frame(fit="pad")
    assert np.array_equal(made, expected((y + 43) * 32 // 346, x * 32 // 346, (32, 32)))
    assert made.sum() == len(EVENTS)
    assert not made[:, :3].any()


def test_cropping_keeps_the_middle_and_the_aspect():
    made = frame(fit="crop")
    assert np.array_equal(made, expected(y * 32 // 260, (x - 43) * 32 // 260, (32, 32)))
    assert 0 < made.sum() < len(EVENTS)


def test_stretching_fills_the_frame():
    assert np.array_equal(frame(fit="stretch"), expected(y * 32 // 260, x * 32 // 346, (32, 32)))


@pytest.mark.parametrize("fit", ["pad", "crop", "stretch"])
def test_flips_turn_the_frame(fit):
    plain = frame(fit=fit, size=(13, 20))
    assert np.array_equal(frame(fit=fit, size=(13, 20), flip_x=True), plain[..., ::-1])
    assert np.array_equal(frame(fit=fit, size=(13, 20), flip_y=True), plain[:, ::-1])
    assert np.array_equal(frame(fit=fit, size=(13, 20), flip_x=True, flip_y=True), plain[:, ::-1, ::-1])


def test_a_frame_of_the_sensors_aspect_needs_no_fit():
    options = FrameOptions(size=(130, 173), fit="pad")
    assert fitted_size((260, 346), options) == (260, 346)
    assert say_fit((260, 346), options) == ""
    assert np.array_equal(frame(size=(130, 173), fit="pad"), frame(size=(130, 173), fit="stretch"))


@pytest.mark.parametrize(("fit", "said"), [("pad", "padded to 346×346"), ("crop", "cropped to 260×260"),
                                           ("stretch", "stretched")])  # fmt: skip
def test_the_fit_is_said(fit, said):
    assert say_fit((260, 346), FrameOptions(fit=fit)) == f"{said} to fill frames of 32×32"


@pytest.mark.parametrize("options", [{"fit": "crop"}, {"fit": "pad", "flip_x": True, "flip_y": True}])
def test_a_stream_is_cut_like_a_file(options):
    given = FrameOptions(timesteps=4, duration_us=500_000, **options)
    recording = NamedBytes(encode_davis(EVENTS, "DAVIS346"))
    filed = frames_of_windows(lambda: open_recording(recording_again(recording)), [(None, None)], given)[0]
    live = LiveFrames((260, 346), given, "stream")
    with open_recording(recording_again(recording)) as opened:
        frames = [made for chunk in opened.packed() for made in live.push(chunk)]
    frames += live.finish()
    assert np.array_equal(np.stack([made.counts for made in frames[:4]]), filed.counts)
    assert sum(made.events for made in frames[:4]) == filed.events


def test_unknown_options_are_refused():
    with pytest.raises(ValueError, match="fit is 'squeeze', expected one of stretch, pad, crop"):
        FrameOptions(fit="squeeze")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="hot_pixels is 'no', expected one of keep, drop"):
        FrameOptions(hot_pixels="no")  # pyright: ignore[reportArgumentType]
