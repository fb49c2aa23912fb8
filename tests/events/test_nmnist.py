"""N-MNIST's records of five bytes."""

import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parent))
from event_files import Named, events_of, nmnist

from multifire.events import open_recording, read_events

SHARED = Path(__file__).parents[3] / "shared" / "data" / "nmnist-1100.zip"
MARK = bytes([0, 240, 0, 0, 0])


@pytest.mark.skipif(not SHARED.is_file(), reason="the shared N-MNIST recordings are not here")
def test_real_recordings():
    with zipfile.ZipFile(SHARED) as file:
        for name in file.namelist()[::25]:
            content = file.read(name)
            events = read_events(Named(content))  # known without its name
            marks = np.frombuffer(content, np.uint8).reshape(-1, 5)[:, 1] == 240
            assert len(events) == len(content) // 5 - marks.sum(), name
            assert max(events["x"].max(), events["y"].max()) < 34, name
            assert min(events["x"].min(), events["y"].min()) >= 0, name
            assert 250_000 < events["t"][-1] < 350_000, name  # three saccades of 100 ms
            assert set(events["p"].tolist()) == {0, 1}, name


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 2**23 - 1), st.integers(0, 33), st.integers(0, 33), st.integers(0, 1)), min_size=1
    )
)
def test_gives_back_what_was_packed(rows):
    rows = sorted(rows, key=lambda row: row[0])
    with open_recording(Named(nmnist(rows))) as recording:
        assert (recording.format, recording.sensor_size) == ("nmnist", (34, 34))
    assert np.array_equal(read_events(Named(nmnist(rows))), events_of(rows))


def test_each_overflow_mark_adds_to_all_times_behind_it():
    rows = [(10, 1, 1, 1), (20, 2, 2, 0), (30, 3, 3, 1)]
    content = nmnist(rows[:1]) + MARK + nmnist(rows[1:2]) + MARK + MARK + nmnist(rows[2:])
    assert read_events(Named(content))["t"].tolist() == [10, 20 + 8192, 30 + 3 * 8192]


def test_marks_count_beyond_what_is_read_at_a_time():
    rows = [(10, 1, 1, 1)] * 3000
    content = MARK + nmnist(rows) + MARK + nmnist(rows)
    assert read_events(Named(content))["t"].tolist() == [10 + 8192] * 3000 + [10 + 2 * 8192] * 3000


@pytest.mark.parametrize("cut", range(1, 5))
def test_cut_within_an_event_keeps_the_whole_ones(caplog, cut):
    rows = [(10, 1, 1, 1), (20, 2, 2, 0)]
    assert np.array_equal(read_events(Named(nmnist(rows)[:-cut])), events_of(rows[:1]))
    assert len([text for text in caplog.messages if "cut short in the middle of an event" in text]) == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"\1\1\0", "holds no event"),
        (MARK * 3, "holds no event"),
        (nmnist([(1, 2, 2, 1), (2, 34, 2, 1)]), r"event 1 .* column 34, row 2, expected a sensor of 34 × 34"),
        (nmnist([(1, 2, 2, 1), (2, 3, 250, 1)]), r"event 1 .* column 3, row 250"),
    ],
)
def test_what_is_none_is_refused(content, message):
    with pytest.raises(ValueError, match=message):
        read_events(Named(content, "00001.bin"))


def test_time_that_runs_backwards_is_sorted_stably_and_told(caplog):
    events = read_events(Named(nmnist([(9, 1, 1, 1), (5, 2, 1, 1), (9, 3, 1, 1), (5, 4, 1, 1)])))
    assert events["x"].tolist() == [2, 4, 1, 3]
    assert "time runs backwards 2 times" in caplog.text
