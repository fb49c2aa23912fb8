"""N-MNIST recordings, which hold five bytes for each event."""

import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parent))
from event_files import NamedBytes, encode_nmnist, events_of

from multifire.events import open_recording, read_events

SHARED = Path(__file__).parents[3] / "shared" / "data" / "nmnist-1100.zip"
OVERFLOW = bytes([0, 240, 0, 0, 0])


@pytest.mark.skipif(not SHARED.is_file(), reason="the shared N-MNIST recordings are not here")
def test_real_recordings_are_decoded():
    with zipfile.ZipFile(SHARED) as file:
        for name in file.namelist()[::25]:
            content = file.read(name)
            events = read_events(NamedBytes(content))  # the format is recognised without the file's name
            overflows = np.frombuffer(content, np.uint8).reshape(-1, 5)[:, 1] == 240
            assert len(events) == len(content) // 5 - overflows.sum(), name
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
def test_decoding_gives_the_encoded_events(rows):
    rows = sorted(rows, key=lambda row: row[0])
    with open_recording(NamedBytes(encode_nmnist(rows))) as recording:
        assert (recording.format, recording.sensor_size) == ("nmnist", (34, 34))
    assert np.array_equal(read_events(NamedBytes(encode_nmnist(rows))), events_of(rows))


def test_each_overflow_mark_adds_8192_us_to_all_later_times():
    rows = [(10, 1, 1, 1), (20, 2, 2, 0), (30, 3, 3, 1)]
    content = (
        encode_nmnist(rows[:1]) + OVERFLOW + encode_nmnist(rows[1:2]) + OVERFLOW + OVERFLOW + encode_nmnist(rows[2:])
    )
    assert read_events(NamedBytes(content))["t"].tolist() == [10, 20 + 8192, 30 + 3 * 8192]


def test_overflow_marks_also_count_for_later_chunks():
    rows = [(10, 1, 1, 1)] * 3000
    content = OVERFLOW + encode_nmnist(rows) + OVERFLOW + encode_nmnist(rows)
    assert read_events(NamedBytes(content))["t"].tolist() == [10 + 8192] * 3000 + [10 + 2 * 8192] * 3000


@pytest.mark.parametrize("cut", range(1, 5))
def test_truncated_recording_keeps_the_complete_events(caplog, cut):
    rows = [(10, 1, 1, 1), (20, 2, 2, 0)]
    assert np.array_equal(read_events(NamedBytes(encode_nmnist(rows)[:-cut])), events_of(rows[:1]))
    assert len([text for text in caplog.messages if "cut short in the middle of an event" in text]) == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"\1\1\0", "holds no event"),
        (OVERFLOW * 3, "holds no event"),
        (encode_nmnist([(1, 2, 2, 1), (2, 34, 2, 1)]), r"event 1 .* column 34, row 2, expected a sensor of 34 × 34"),
        (encode_nmnist([(1, 2, 2, 1), (2, 3, 250, 1)]), r"event 1 .* column 3, row 250"),
    ],
)
def test_invalid_recording_is_refused(content, message):
    with pytest.raises(ValueError, match=message):
        read_events(NamedBytes(content, "00001.bin"))


def test_events_out_of_order_are_sorted_stably_with_a_warning(caplog):
    events = read_events(NamedBytes(encode_nmnist([(9, 1, 1, 1), (5, 2, 1, 1), (9, 3, 1, 1), (5, 4, 1, 1)])))
    assert events["x"].tolist() == [2, 4, 1, 3]
    assert "time runs backwards 2 times" in caplog.text
