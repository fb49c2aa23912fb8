import io
import logging
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from multifire import events as ev
from multifire.events import saccade

GOLDEN = Path(__file__).parents[1] / "golden" / "events.zip"


@pytest.fixture(scope="module")
def golden() -> dict[str, bytes]:
    with zipfile.ZipFile(GOLDEN) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def make_events(count: int, seed: int = 0, span: int = 1_000_000) -> np.ndarray:
    rng = np.random.default_rng(seed)
    found = np.empty(count, ev.EVENT_DTYPE)
    found["t"] = np.sort(rng.integers(0, span, count))
    found["x"], found["y"], found["p"] = (rng.integers(0, top, count) for top in (128, 128, 2))
    return found


def naive(events, options: ev.FrameOptions) -> np.ndarray:
    """One event after the other, as the docstring of FrameOptions says it."""
    frames = np.zeros((options.timesteps, 2, *options.size), int)
    if not len(events):
        return frames
    t = events["t"].astype(object)
    for rank, event in enumerate(events):
        past, span = t[rank] - t[0], t[-1] - t[0] + 1
        k = {
            "duration": past // options.duration_us,
            "time": past * options.timesteps // span,
            "count": rank * options.timesteps // len(events),
        }[options.slicing]
        if k < options.timesteps:
            factor = options.factor or 128 / options.size[0]
            frames[k, event["p"], int(event["y"] // factor), int(event["x"] // factor)] += 1
    return np.minimum(frames, 1) if options.binary else frames


def aedat2(events: np.ndarray) -> bytes:
    address = events["y"].astype(int) << 8 | (127 - events["x"].astype(int)) << 1 | events["p"]
    return b"#!AER-DAT2.0\r\n" + np.stack([address, events["t"]], 1).astype(">u4").tobytes()


def test_golden_gesture(golden):
    frames = np.load(io.BytesIO(golden["frames.npz"]))["gesture_frames"]
    rows = [line.split(",") for line in golden["user02_led_labels.csv"].decode().split()[1:]]
    windows = [(int(start), int(end)) for _, start, end in rows]
    found = ev.frames_of_windows(
        lambda: ev.open_recording(io.BytesIO(golden["user02_led.aedat"])), windows, ev.FrameOptions()
    )
    assert len(found) == len(frames) == 3
    for mine, theirs in zip(found, frames, strict=True):
        assert np.array_equal(mine.counts, theirs)
        assert (mine.events, mine.clipped) == (theirs.sum(), 0)


def test_golden_cifar10_dvs(golden):
    theirs = np.load(io.BytesIO(golden["frames.npz"]))["cifar10dvs_frames_indexed_x_y"]
    events = ev.read_events(io.BytesIO(golden["cifar10dvs.aedat"]))
    mine = ev.to_frames(events, size=(42, 42), duration_us=10_000, timesteps=10, factor=3.04)
    assert np.array_equal(mine.transpose(0, 1, 3, 2), theirs)


@settings(max_examples=60, deadline=None)
@given(
    count=st.integers(0, 200),
    seed=st.integers(0, 1 << 30),
    slicing=st.sampled_from(["duration", "time", "count"]),
    timesteps=st.integers(1, 9),
    binary=st.booleans(),
    size=st.sampled_from([8, 32, 64]),
)
def test_frames_equal_counting_one_by_one(count, seed, slicing, timesteps, binary, size):
    options = ev.FrameOptions((size, size), timesteps, slicing, 90_000, binary)
    events = make_events(count, seed)
    found = ev.to_frames(events, (128, 128), options.size, 90_000, timesteps, slicing=slicing, binary=binary)
    assert found.dtype == np.int32
    assert np.array_equal(found, naive(events, options))


@pytest.mark.parametrize("slicing", ["duration", "time", "count"])
@pytest.mark.parametrize("order", ["sorted", "shuffled"])
def test_windows_equal_frames_of_their_events(slicing, order):
    events = make_events(200_000)  # several chunks
    shuffled = events if order == "sorted" else np.random.default_rng(1).permutation(events)
    sorted_again = shuffled[np.argsort(shuffled["t"], kind="stable")]
    windows = [(None, None), (100_000, 400_000), (350_000, 900_001), (2_000_000, 3_000_000), (None, 7_000)]
    options = ev.FrameOptions((16, 16), 7, slicing, 20_000)
    content = aedat2(shuffled)
    found = ev.frames_of_windows(lambda: ev.open_recording(io.BytesIO(content)), windows, options)
    for (start, end), frames in zip(windows, found, strict=True):
        t = sorted_again["t"]
        part = sorted_again[(t >= (start or 0)) & (t < (end or 1 << 40))]
        expected = ev.to_frames(part, size=(16, 16), duration_us=20_000, timesteps=7, slicing=slicing)
        assert np.array_equal(frames.counts, np.minimum(expected, 255))
        assert frames.clipped == np.count_nonzero(expected > 255)
        assert frames.events == expected.sum()
        assert (frames.first_us, frames.last_us) == ((part["t"][0], part["t"][-1]) if len(part) else (0, 0))


def test_counts_saturate_and_say_so(caplog):
    events = np.zeros(1000, ev.EVENT_DTYPE)
    assert ev.to_frames(events)[0, 0, 0, 0] == 1000
    with caplog.at_level(logging.WARNING, logger="multifire"):
        assert ev.to_frames(events, dtype=np.uint8).max() == 255
    assert caplog.messages == ["1 cells hold more than 255 events and were clipped"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sensor_size": (64, 64)}, "sensor of 64 × 64"),
        ({"slicing": "days"}, "slicing is 'days'"),
        ({"timesteps": 0}, "at least 1"),
        ({"factor": 2.0}, "larger factor"),
        ({"factor": float("nan")}, "factor is nan"),
    ],
)
def test_options_that_do_not_fit(arguments, message):
    with pytest.raises(ValueError, match=message):
        ev.to_frames(make_events(2000), **arguments)


def test_arrays_that_are_no_events():
    for wrong in (np.zeros((3, 4)), np.zeros(3, [("t", "f8"), ("x", "i2"), ("y", "i2"), ("p", "i1")])):
        with pytest.raises(ValueError, match="fields t, x, y, p"):
            ev.to_frames(wrong)
    negative = make_events(5)
    negative["x"][3] = -1
    with pytest.raises(ValueError, match="event 3"):
        ev.to_frames(negative)


@pytest.fixture(scope="module")
def digits() -> np.ndarray:
    path = Path(saccade.__file__).parents[1] / "datasets" / "digits.npz"
    with np.load(path, allow_pickle=False) as arrays:
        return arrays["train_images"][:40, 0]


def test_simulated_digits_are_like_nmnist(digits):
    found = list(saccade.simulate_events(digits))
    assert 3_000 < np.mean([len(events) for events in found]) < 5_500
    for events in found:
        assert (np.diff(events["t"]) >= 0).all()
        assert 0 <= events["t"][0] <= events["t"][-1] < 300_000
        assert max(events["x"].max(), events["y"].max()) < 34
        assert 0.4 < events["p"].mean() < 0.6


def test_a_picture_is_simulated_alike_whatever_is_beside_it(digits):
    whole = list(saccade.simulate_events(digits, seed=3))
    alone = next(saccade.simulate_events(digits[37:38], seed=3, first=37))
    assert np.array_equal(whole[37], alone)
    assert not np.array_equal(alone, next(saccade.simulate_events(digits[37:38], seed=4, first=37)))


def test_simulated_frames_are_frames_of_the_simulated_events(digits):
    options = ev.FrameOptions((17, 17), 6, "time")
    frames = saccade.simulate_frames(digits[:5], options)
    for mine, events in zip(frames, saccade.simulate_events(digits[:5]), strict=True):
        assert np.array_equal(mine, ev.to_frames(events, (34, 34), (17, 17), timesteps=6, slicing="time"))


def test_a_blank_picture_makes_noise_alone():
    still = saccade.SaccadeOptions(noise_hz=0)
    assert len(next(saccade.simulate_events(np.full((1, 20, 20), 99, np.uint8), still))) == 0
    noise = saccade.SaccadeOptions(noise_hz=10)
    assert 2_900 < len(next(saccade.simulate_events(np.zeros((1, 20, 20), np.uint8), noise))) < 4_000


def test_brighter_is_polarity_one():
    edge = np.zeros((1, 34, 34), np.uint8)
    edge[:, :, 17:] = 255
    options = saccade.SaccadeOptions(noise_hz=0)
    events = next(saccade.simulate_events(edge, options))
    first_side = events[events["t"] < 100_000]  # the gaze goes half the amplitude to the right, towards the light
    assert len(first_side) > 100
    assert (first_side["p"] == 1).all()


def test_pictures_that_do_not_fit():
    for wrong in (np.zeros((1, 40, 40), np.uint8), np.zeros((1, 20, 20)), np.zeros((20, 20), np.uint8)):
        with pytest.raises(ValueError, match="expected uint8"):
            next(saccade.simulate_events(wrong))
