"""Simulated events: properties that they have for every image."""

import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))
from event_files import NamedBytes

from multifire.events import EVENT_DTYPE, FrameOptions, read_events, to_frames
from multifire.events.simulate import SaccadeOptions, simulate_events, simulate_frames

SHARED = Path(__file__).parents[3] / "shared" / "data" / "nmnist-1100.zip"
NO_NOISE = SaccadeOptions(noise_hz=0)


@pytest.fixture(scope="module")
def digits() -> np.ndarray:
    with np.load(Path(__file__).parents[2] / "src/multifire/datasets/digits.npz") as arrays:
        return arrays["test_images"][:40, 0]


def test_events_lie_on_the_sensor_in_order_and_have_both_polarities(digits):
    for events in simulate_events(digits, seed=1):
        assert events.dtype == EVENT_DTYPE
        assert (np.diff(events["t"]) >= 0).all()
        assert events["t"][0] >= 0
        assert events["t"][-1] < 300_000
        assert min(events["x"].min(), events["y"].min()) >= 0
        assert max(events["x"].max(), events["y"].max()) < 34
        assert 0.35 < events["p"].mean() < 0.65


def test_seed_and_image_number_determine_the_events(digits):
    whole = list(simulate_events(digits, seed=3))
    again = list(simulate_events(digits, seed=3))
    late = list(simulate_events(digits[30:], seed=3, first=30))
    other = list(simulate_events(digits, seed=4))
    assert all(np.array_equal(a, b) for a, b in zip(whole, again, strict=True))
    assert all(np.array_equal(a, b) for a, b in zip(whole[30:], late, strict=True))
    assert not any(np.array_equal(a, b) for a, b in zip(whole, other, strict=True))


@pytest.mark.skipif(not SHARED.is_file(), reason="the shared N-MNIST recordings are not here")
def test_numbers_of_events_are_similar_to_real_recordings(digits):
    with zipfile.ZipFile(SHARED) as file:
        real = np.array([len(read_events(NamedBytes(file.read(name)))) for name in file.namelist()[::10]])
    simulated = np.array([len(events) for events in simulate_events(digits)])
    assert real.min() <= simulated.min()
    assert simulated.max() <= real.max()
    assert 0.7 < np.median(simulated) / np.median(real) < 1.4


@pytest.mark.parametrize("slicing", ["duration", "time", "count"])
def test_simulated_frames_equal_the_frames_of_the_simulated_events(digits, slicing):
    options = FrameOptions(size=(17, 17), timesteps=6, slicing=slicing, duration_us=40_000)
    made = simulate_frames(digits[:6], options, seed=2)
    for frames, events in zip(made, simulate_events(digits[:6], seed=2), strict=True):
        expected = to_frames(events, (34, 34), (17, 17), 40_000, 6, slicing=slicing)
        assert np.array_equal(frames, np.minimum(expected, 255))


def test_uniform_image_gives_only_noise_events():
    grey = np.full((1, 28, 28), 90, np.uint8)
    assert len(next(simulate_events(grey, NO_NOISE))) == 0
    noisy = next(simulate_events(grey, SaccadeOptions(noise_hz=10)))
    assert 0.8 < len(noisy) / (10 * 34 * 34 * 0.3) < 1.2


def test_lower_threshold_gives_more_events(digits):
    few, many = (
        sum(map(len, simulate_events(digits[:5], SaccadeOptions(threshold=theta, noise_hz=0)))) for theta in (0.7, 0.2)
    )
    assert many > 2 * few > 0


def test_on_and_off_events_of_a_pixel_differ_by_at_most_one(digits):
    """The gaze ends where it began, so the changes of a pixel's brightness add up to zero."""
    events = next(simulate_events(digits[:1], NO_NOISE))
    balance = np.zeros((34, 34), int)
    np.add.at(balance, (events["y"], events["x"]), 2 * events["p"].astype(int) - 1)
    assert np.abs(balance).max() <= 1


@pytest.mark.parametrize(
    ("images", "seed", "message"),
    [
        (np.zeros((1, 40, 28), np.uint8), 0, r"uint8 \[1, 40, 28\], expected uint8 \[N, H, W\] of at most 34 × 34"),
        (np.zeros((28, 28), np.uint8), 0, r"images are uint8 \[28, 28\]"),
        (np.zeros((1, 28, 28)), 0, "images are float64"),
        (np.zeros((1, 28, 28), np.uint8), -1, "seed is -1"),
    ],
)
def test_invalid_images_are_refused(images, seed, message):
    with pytest.raises(ValueError, match=message):
        next(simulate_events(images, seed=seed))


@pytest.mark.parametrize("option", ["steps", "duration_us", "dark", "threshold"])
def test_options_of_0_are_refused(option):
    with pytest.raises(ValueError, match="must be above 0"):
        SaccadeOptions(**{option: 0})
