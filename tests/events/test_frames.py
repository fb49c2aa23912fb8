"""Frames equal those of the authors' code and those of a loop over single events."""

import io
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parent))
from event_files import AEDAT2_HEADER, AEDAT31_HEADER, NamedBytes, encode_aedat2, events_of, packet, random_events

from multifire.events import FrameOptions, aedat, frames, frames_of_windows, open_recording, read_events, to_frames
from multifire.events import recording as recordings

GOLDEN = Path(__file__).parents[1] / "golden" / "events.zip"


@pytest.fixture(scope="module")
def golden():
    """Return the two recordings and the results of the authors' preprocessing, by their names in the archive."""
    with zipfile.ZipFile(GOLDEN) as file:
        found: dict = {name: file.read(name) for name in file.namelist()}
    with np.load(io.BytesIO(found["frames.npz"])) as arrays:
        return found | {name: arrays[name] for name in arrays.files}


def opener(content: bytes):
    return lambda: open_recording(NamedBytes(content))


# Against the authors' code


def test_gesture_frames_equal_the_authors_code(golden):
    rows = [line.split(",") for line in golden["user02_led_labels.csv"].decode().split()[1:]]
    windows = [(int(start), int(end)) for _, start, end in rows]
    made = frames_of_windows(opener(golden["user02_led.aedat"]), windows, FrameOptions())
    assert np.array_equal([window.counts for window in made], golden["gesture_frames"])
    assert [int(kind) - 1 for kind, _, _ in rows] == golden["gesture_labels"].tolist()
    assert [window.clipped for window in made] == [0, 0, 0]


def test_cifar10_dvs_frames_equal_the_authors_code(golden):
    options = {"size": (42, 42), "duration_us": 10_000, "timesteps": 10, "factor": 3.04}
    events = read_events(NamedBytes(golden["cifar10dvs.aedat"]))
    expected = golden["cifar10dvs_frames_indexed_x_y"].swapaxes(-1, -2)
    assert np.array_equal(to_frames(events, **options), expected)
    made = frames_of_windows(opener(golden["cifar10dvs.aedat"]), [(None, None)], FrameOptions(**options))[0]
    assert np.array_equal(made.counts, expected)
    first = golden["cifar10dvs_events_txyp"].astype(int)
    assert np.array_equal(np.stack([events[name][: len(first)] for name in "txyp"], 1), first)


# Against a loop


def frames_by_loop(events, sensor, size, timesteps, slicing, duration_us=1, binary=False, factor=None):
    """Count frames by their definition, one event at a time."""
    counts = np.zeros((timesteps, 2, *size), int)
    if not len(events):
        return counts
    t0, last = int(events["t"][0]), int(events["t"][-1])
    for rank, (t, x, y, p) in enumerate(events.tolist()):
        if slicing == "duration":
            k = (t - t0) // duration_us
        elif slicing == "time":
            k = (t - t0) * timesteps // (last - t0 + 1)
        else:
            k = rank * timesteps // len(events)
        row = int(y // factor) if factor else y * size[0] // sensor[0]
        column = int(x // factor) if factor else x * size[1] // sensor[1]
        if k < timesteps:
            counts[k, p, row, column] += 1
    return np.minimum(counts, 1) if binary else counts


OPTIONS = st.fixed_dictionaries(
    {
        "slicing": st.sampled_from(["duration", "time", "count"]),
        "timesteps": st.integers(1, 9),
        "duration_us": st.integers(1, 60),
        "binary": st.booleans(),
    }
)
EVENTS = st.lists(
    st.tuples(st.integers(0, 300), st.integers(0, 12), st.integers(0, 9), st.integers(0, 1)), max_size=60
).map(lambda rows: events_of(sorted(rows, key=lambda row: row[0])))


@settings(max_examples=200, deadline=None)
@given(EVENTS, OPTIONS, st.sampled_from([((10, 13), None), ((4, 5), None), ((1, 1), None), ((5, 6), 2.3)]))
def test_frames_equal_a_loop_over_events(events, options, binning):
    size, factor = binning
    made = to_frames(events, (10, 13), size, factor=factor, **options)
    assert made.dtype == np.int32
    assert np.array_equal(made, frames_by_loop(events, (10, 13), size, factor=factor, **options))
    if not options["binary"]:
        within = options["slicing"] != "duration" or options["duration_us"] * options["timesteps"]
        inside = np.ones(len(events), bool) if within is True else events["t"] - events["t"][:1] < within
        assert made.sum() == np.count_nonzero(inside)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 300), st.integers(0, 9), st.integers(0, 9), st.integers(0, 1)), min_size=1),
    OPTIONS,
    st.lists(st.tuples(st.integers(0, 300), st.integers(1, 200)), min_size=1, max_size=3),
    st.sampled_from([8, 40, 1 << 18]),
)
def test_windows_equal_a_loop_for_any_chunk_size(rows, options, spans, chunk_bytes):
    """A recording whose time runs backwards gives the frames of the stably sorted recording."""
    windows = [(None, None), *((start, start + length) for start, length in spans)]
    options = {"size": (4, 4), **options}
    with pytest.MonkeyPatch.context() as patch:
        for module in (recordings, aedat):
            patch.setattr(module, "CHUNK_BYTES", chunk_bytes)
        made = frames_of_windows(opener(AEDAT31_HEADER + packet(rows)), windows, FrameOptions(factor=32, **options))
    events = events_of(sorted(rows, key=lambda row: row[0]))
    for (start, end), window in zip(windows, made, strict=True):
        selected = events if start is None else events[(events["t"] >= start) & (events["t"] < end)]
        expected = frames_by_loop(selected, (128, 128), factor=32, **options)
        assert np.array_equal(window.counts, expected)
        if len(selected):
            assert (window.first_us, window.last_us) == (selected["t"][0], selected["t"][-1])
        assert (window.events > 0) == (len(selected) > 0)


@pytest.mark.parametrize("slicing", ["duration", "time", "count"])
def test_arrays_and_recordings_give_the_same_frames(slicing, monkeypatch):
    events = random_events(20_000)
    options = {"size": (42, 42), "timesteps": 7, "slicing": slicing, "duration_us": 120_001, "factor": 3.04}
    expected = frames_by_loop(events, (128, 128), **options)
    assert np.array_equal(to_frames(events, **options), expected)
    monkeypatch.setattr(frames, "SLICE_EVENTS", 777)
    assert np.array_equal(to_frames(events, **options), expected)
    made = frames_of_windows(opener(encode_aedat2(events)), [(None, None)], FrameOptions(**options))[0]
    assert np.array_equal(made.counts, expected)
    assert made.events == expected.sum()


def test_fractional_factor_assigns_every_pixel_to_a_cell():
    events = events_of((0, x, 0, 1) for x in range(128))
    row = to_frames(events, size=(43, 43), timesteps=1, factor=3.04)[0, 1, 0]
    assert row.tolist() == np.bincount([int(x // 3.04) for x in range(128)], minlength=43).tolist()
    assert np.flatnonzero(row).tolist() == list(range(42))
    with pytest.raises(ValueError, match=r"a factor of 3\.04 makes 42 cells of 128 pixels, more than the frame's 41"):
        to_frames(events, size=(41, 41), factor=3.04)


# Counts that are too large, and invalid input


def test_counts_saturate_and_the_clipped_cells_are_counted(caplog):
    rows = [(5, 3, 4, 1)] * 300 + [(6, 100, 4, 0)] * 255 + [(7, 3, 100, 0)] * 256
    made = frames_of_windows(opener(encode_aedat2(rows)), [(None, None)], FrameOptions(timesteps=1))[0]
    assert sorted(made.counts[made.counts > 0].tolist()) == [255, 255, 255]
    assert (made.clipped, made.events) == (2, 811)
    events = events_of(rows)
    assert to_frames(events, timesteps=1).max() == 300
    assert not caplog.messages
    assert to_frames(events, timesteps=1, dtype=np.int8).max() == 127
    assert "3 cells hold more than 127 events and were clipped" in caplog.text
    assert to_frames(events, timesteps=1, binary=True, dtype=np.uint8).sum() == 3


def test_no_events_give_frames_of_zeros():
    made = to_frames(events_of([]), size=(3, 3), timesteps=2, slicing="count")
    assert made.shape == (2, 2, 3, 3)
    assert not made.any()
    empty = frames_of_windows(opener(encode_aedat2([(5, 1, 1, 1)])), [(6, 9)], FrameOptions())[0]
    assert (empty.events, empty.first_us, empty.last_us, int(empty.counts.sum())) == (0, 0, 0, 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"slicing": "space"}, "slicing is 'space', expected one of duration, time, count"),
        ({"timesteps": 0}, "must be at least 1"),
        ({"duration_us": 0}, "must be at least 1"),
        ({"size": (0, 3)}, "must be at least 1"),
        ({"factor": 0.0}, "factor is 0.0, expected more than 0"),
        ({"factor": float("nan")}, "factor is nan"),
        ({"sensor_size": (4, 4)}, r"event 0 .* lies at column 9, row 1, expected a sensor of 4 × 4"),
    ],
)
def test_invalid_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        to_frames(events_of([(1, 9, 1, 1)]), **options)


@pytest.mark.parametrize("row", [(1, -1, 0, 0), (1, 0, -1, 0), (1, 0, 0, 2), (1, 0, 0, -1)])
def test_invalid_events_are_refused(row):
    with pytest.raises(ValueError, match=r"event 1 is .*expected x, y >= 0 and p 0 or 1"):
        to_frames(events_of([(1, 0, 0, 0), row]))


def test_array_without_event_fields_is_refused():
    with pytest.raises(ValueError, match="events are float64, expected an array with fields t, x, y, p"):
        to_frames(np.zeros((3, 4)))


def test_recording_without_a_sensor_size_is_refused():
    content = b"#!AER-DAT3.1\n#!END-HEADER\n" + packet([(1, 1, 1, 1)])
    with pytest.raises(ValueError, match=r"does not say its sensor's size; open it with sensor_size=\(H, W\)"):
        frames_of_windows(opener(content), [(None, None)], FrameOptions())


def test_memory_does_not_grow_with_the_recording():
    import tracemalloc

    t = np.arange(400_000)
    content = AEDAT2_HEADER + np.stack([np.full_like(t, 2), t], 1).astype(">u4").tobytes()
    peaks = []
    for divisor in (2, 1):
        recording = NamedBytes(content[: len(AEDAT2_HEADER) + (len(content) - len(AEDAT2_HEADER)) // divisor])
        tracemalloc.start()
        frames_of_windows(lambda recording=recording: open_recording(recording), [(None, None)], FrameOptions())
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.05 * peaks[0]
