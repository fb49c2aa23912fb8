"""AEDAT 2.0 by chip: DVS128 and DAVIS, told from the header or from the addresses."""

import io
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parent))
from event_files import AEDAT2_HEADER, NamedBytes, encode_aedat2, encode_davis, events_of, random_events, sensor_events

from multifire.events import open_recording, read_events

CHIPS = {
    "eu.seebetter.ini.chips.davis.Davis346blue": (260, 346),
    "eu.seebetter.ini.chips.davis.DAVIS240C": (180, 240),
    "eu.seebetter.ini.chips.davis.Davis208PixelParade": (192, 208),
}


class Pipe(io.BytesIO):
    def seekable(self):
        return False

    def seek(self, *_):
        raise io.UnsupportedOperation("seek")

    def tell(self):
        raise io.UnsupportedOperation("tell")


@pytest.mark.parametrize("flag", [1 << 31, 1 << 10, 1 << 31 | 0xC00])
@pytest.mark.parametrize("chip", CHIPS)
def test_davis_named_in_the_header_is_read_without_its_other_records(chip, flag):
    height, width = CHIPS[chip]
    events = sensor_events(width, height)
    other = np.random.default_rng(1).random(len(events)) < 0.2
    content = encode_davis(events, chip, other, flag)
    with open_recording(NamedBytes(content)) as recording:
        assert (recording.format, recording.sensor_size) == ("aedat2", (height, width))
    assert np.array_equal(read_events(NamedBytes(content)), events[~other])


@pytest.mark.parametrize("size", CHIPS.values())
def test_davis_is_told_from_the_addresses(size):
    events = sensor_events(size[1], size[0], seed=2)
    with open_recording(NamedBytes(encode_davis(events))) as recording:
        assert recording.sensor_size == size
    assert np.array_equal(read_events(NamedBytes(encode_davis(events))), events)
    assert np.array_equal(read_events(Pipe(encode_davis(events))), events)


def test_sensor_that_the_addresses_do_not_tell_is_asked_for():
    events = sensor_events(300, 200)
    with open_recording(NamedBytes(encode_davis(events))) as recording:
        assert recording.sensor_size is None
    with open_recording(NamedBytes(encode_davis(events)), sensor_size=(200, 300)) as recording:
        assert recording.sensor_size == (200, 300)
    assert np.array_equal(read_events(NamedBytes(encode_davis(events))), events)
    with open_recording(Pipe(encode_davis(sensor_events(346, 260)))) as recording:
        assert recording.sensor_size is None  # a pipe cannot be read twice


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 2**31 - 1), st.integers(0, 345), st.integers(0, 259), st.integers(0, 1))).filter(
        len
    )
)
def test_davis_decodes_to_the_encoded_events(rows):
    events = events_of(sorted(rows, key=lambda row: row[0]))
    assert np.array_equal(read_events(NamedBytes(encode_davis(events, "DAVIS346"))), events)


@pytest.mark.parametrize("x", [0, 160, 175, 208, 345])
def test_first_event_may_look_like_a_line_of_the_header(x):
    """In rows 140 to 143 its first byte is `#`; in columns 160 to 175 its second one ends a line."""
    for y in range(140, 144):
        events = events_of([(5, x, y, 1), (0x0A0A0A, x, y, 0), (0x23232323, 3, 3, 1)])
        assert np.array_equal(read_events(NamedBytes(encode_davis(events, "DAVIS346"))), events)


def test_davis_clock_may_wrap_and_pictures_do_not_disturb_it():
    events = events_of([(2**32 - 20, 1, 1, 1), (2**32 - 10, 2, 2, 0), (2**32 - 9, 0, 0, 0), (2**32 + 5, 340, 1, 1)])
    content = bytearray(encode_davis(events, "DAVIS346", np.array([False, False, True, False])))
    content[-12:-8] = bytes(4)  # the picture's record has the time 0
    assert np.array_equal(read_events(NamedBytes(bytes(content))), events[[0, 1, 3]])


def test_header_names_the_chip_before_the_addresses_do():
    events = random_events(500)
    header = b"# AEChip: ch.unizh.ini.jaer.chip.retina.DVS128\r\n#AEChip: DAVIS346 in a preference\r\n"
    content = AEDAT2_HEADER + header + encode_aedat2(events)[len(AEDAT2_HEADER) :]
    assert np.array_equal(read_events(NamedBytes(content)), events)
    davis = events_of([(1, 3, 0, 1), (2, 15, 0, 0)])  # addresses that a DVS128 could write
    assert np.array_equal(read_events(NamedBytes(encode_davis(davis, "Davis346red"))), davis)


def test_events_beside_a_davis_are_counted_or_dropped(caplog):
    events = sensor_events(346, 260)
    events["x"][[10, 500, 900]] = 400
    content = encode_davis(events, "DAVIS346")
    with pytest.raises(
        ValueError, match=r"event 10 .* column 400, .* expected a sensor of 346 × 260; 3 events of 2,000 lie beside it"
    ):
        read_events(NamedBytes(content))
    assert np.array_equal(read_events(NamedBytes(content), stray="drop"), events[events["x"] < 346])
    assert "made: 3 events beside the sensor of 346 × 260 were dropped" in caplog.text
    with pytest.raises(ValueError, match="stray is 'keep', expected one of refuse, drop"):
        read_events(NamedBytes(content), stray="keep")


def test_recording_of_nothing_but_pictures_is_refused():
    events = sensor_events(346, 260, 50)
    with pytest.raises(ValueError, match="made: holds no event"):
        read_events(NamedBytes(encode_davis(events, "", np.ones(50, bool))))
