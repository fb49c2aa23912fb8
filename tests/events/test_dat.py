"""Prophesee's DAT, versions 1 and 2."""

import struct
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))
from event_files import NamedBytes, events_of, sensor_events

from multifire.events import open_recording, read_events

HEADER = b"% Data file containing CD events.\n% Version 2\n% Date 2014-01-01 10:10:10\n% Height 240\n% Width 304\n"


def encode_dat(events, header=HEADER, kind=12, version=2) -> bytes:
    t, x, y, p = (events[name].astype("u4") for name in "txyp")
    data = x | y << 14 | p << 28 if version == 2 else x | y << 9 | p << 17
    return header + struct.pack("BB", kind, 8) + np.stack([t, data], 1).astype("<u4").tobytes()


def read(content: bytes, **options) -> np.ndarray:
    return read_events(NamedBytes(content), **options)


def test_version_2_is_read_with_its_sensor():
    events = sensor_events(304, 240)
    with open_recording(NamedBytes(encode_dat(events))) as recording:
        assert (recording.format, recording.sensor_size) == ("dat", (240, 304))
    assert np.array_equal(read(encode_dat(events)), events)


def test_version_1_and_a_header_without_sensor_are_read():
    events = sensor_events(304, 240)
    header = b"% Data file containing TD events.\n"
    assert np.array_equal(read(encode_dat(events, header, 0, 1)), events)
    with open_recording(NamedBytes(encode_dat(events, header, 0, 1)), sensor_size=(240, 304)) as recording:
        assert recording.sensor_size == (240, 304)


def test_events_written_by_faery_are_read(tmp_path):
    faery = pytest.importorskip("faery", reason="the extra `cameras` is not installed")
    events = sensor_events(304, 240)
    theirs = np.zeros(len(events), faery.EVENTS_DTYPE)
    for ours, name in (("t", "t"), ("x", "x"), ("y", "y"), ("p", "on")):
        theirs[name] = events[ours]
    faery.events_stream_from_array(theirs, dimensions=(304, 240)).to_file(tmp_path / "a.dat")
    read_back = read_events(tmp_path / "a.dat")
    assert np.array_equal(read_back["t"] - read_back["t"][0], events["t"] - events["t"][0])
    assert all(np.array_equal(read_back[name], events[name]) for name in "xyp")


def test_clock_may_wrap_and_step_back(caplog):
    events = events_of([(2**32 - 9, 1, 1, 1), (2**32 + 4, 2, 2, 0), (2**32 + 2, 3, 3, 1)])
    assert np.array_equal(read(encode_dat(events)), events[[0, 2, 1]])
    assert "time runs backwards 1 times" in caplog.text


def test_events_beside_the_sensor_are_counted_or_dropped():
    events = sensor_events(304, 240)
    events["x"][[3, 4]] = 310
    with pytest.raises(ValueError, match=r"column 310, .* 304 × 240; 2 events of 2,000 lie beside it"):
        read(encode_dat(events))
    assert len(read(encode_dat(events), stray="drop")) == 1998


@pytest.mark.parametrize("cut", range(1, 9))
def test_truncated_recording_keeps_the_complete_events(cut):
    events = sensor_events(304, 240, 10)
    assert np.array_equal(read(encode_dat(events)[:-cut]), events[:9])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (HEADER + struct.pack("BB", 12, 8), "made: holds no event"),
        (HEADER + struct.pack("BB", 14, 8) + bytes(16), "version 2 with events of type 14 and 8 bytes, expected"),
        (b"% Version 7\n" + struct.pack("BB", 12, 8) + bytes(16), "DAT of version 7"),
        (b"% a\n" * 400 + struct.pack("BB", 12, 8) + bytes(16), "its header has more than 256 lines"),
        (HEADER, "of no known format"),
    ],
)
def test_other_files_are_refused(content, message):
    with pytest.raises(ValueError, match=message):
        read(content)
