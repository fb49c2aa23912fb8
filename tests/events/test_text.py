"""Events in text: orders of columns, names, units, separators, and damaged lines."""

import logging
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parent))
from event_files import NamedBytes, encode_text, events_of, sensor_events

from multifire.events import FrameOptions, frames_of_windows, open_recording, read_events, text
from multifire.events.hot_pixels import count_pixels
from multifire.events.overview import look_over


def read(content: bytes, **options) -> np.ndarray:
    return read_events(NamedBytes(content), **options)


@pytest.mark.parametrize(
    ("line", "first"),
    [
        ("{t} {x} {y} {p}", ""),
        ("{x},{y},{p},{t}", ""),
        ("{x}\t{y}\t{t}\t{p}", ""),
        ("{t},{x},{y},{p}\r", ""),
        ("{x};{y};{p};{t}", "x;y;p;t\n"),
        ("{x},{y},{p},{t}", "\ufeffx,y,polarity,timestamp\r\n"),
        ("{t} {y} {x} {p}", "# t y x p\n"),
        ("{t} {x} {y} {p}", "# of a test\n% of another\n\n"),
        ("7,{t},{x},{y},{p},8.5", 'id,"t [us]",x,y,p,other\n'),
        ("  {t}  {x}   {y} {p} ", "346 260\n"),
        ("{t}.0 {x}.0 {y} {p}", ""),
    ],
)
def test_orders_of_columns_are_told(line, first):
    events = sensor_events(346, 260)
    content = encode_text(events, line, first)
    assert np.array_equal(read(content), events)
    with open_recording(NamedBytes(content)) as recording:
        assert (recording.format, recording.sensor_size) == ("text", (260, 346) if first.startswith("346") else None)


@pytest.mark.parametrize(
    ("line", "first", "scale", "said"),
    [
        ("{t:.6f} {x} {y} {p}", "", 1e6, "takes its times as seconds: they have fractions"),
        ("{x},{y},{p},{t:.9f}", "x,y,p,t\n", 1e6, "seconds"),
        ("{t:.18e} {x} {y} {p}", "", 1e6, "seconds"),
        ("{t:.18e} {x} {y} {p}", "", 1, "takes its times as microseconds: they are whole numbers"),
        ("{t} {x} {y} {p}", "", 1, "microseconds"),
        ("{t},{x},{y},{p}", "t_s,x,y,p\n", 1e6, "takes its times as seconds: its column says so"),
        ("{t},{x},{y},{p}", "time (us),x,y,p\n", 1, "takes its times as microseconds: its column says so"),
        ("{t},{x},{y},{p}", "t [\N{GREEK SMALL LETTER MU}s],x,y,p\n", 1, "takes its times as microseconds"),
        ("{t:.3f},{x},{y},{p}", "t_ms,x,y,p\n", 1e3, "takes its times as milliseconds: its column says so"),
        ("{t:.3f},{x},{y},{p}", "time [ms],x,y,p\n", 1e3, "takes its times as milliseconds: its column says so"),
    ],
)
def test_unit_of_time_is_told_and_said(caplog, line, first, scale, said):
    caplog.set_level(logging.INFO)
    events = sensor_events(128, 128, start_us=51_000_000_000)
    assert np.array_equal(read(encode_text(events, line, first, scale)), events)
    assert said in caplog.text


@pytest.mark.parametrize("column", ["t (ns)", "t_ns", "time [minutes]"])
def test_other_units_are_refused(column):
    with pytest.raises(ValueError, match=r"is in (ns|minutes), expected us, ms or s; write it anew"):
        read(f"{column},x,y,p\n1000,1,1,1\n".encode())


def test_a_late_event_does_not_change_the_columns():
    events = sensor_events(346, 260)
    late = events.copy()
    late["t"][100] = events["t"][100] - 25_000
    in_order = late[np.argsort(late["t"], kind="stable")]
    assert np.array_equal(read(encode_text(late, "{x} {y} {t} {p}")), in_order)


def test_a_huge_sensor_is_read_but_not_counted():
    content = b"32768 32768\n0 1 1 1\n"
    assert len(read(content)) == 1
    for count in (
        lambda: look_over(lambda: open_recording(NamedBytes(content))),
        lambda: count_pixels(open_recording(NamedBytes(content))),
        lambda: frames_of_windows(lambda: open_recording(NamedBytes(content)), [(None, None)], FrameOptions((4, 4), 1)),
    ):
        with pytest.raises(ValueError, match="sensor has 32768 × 32768 pixels, expected 1 to 4096 a side"):
            count()


def test_microseconds_with_fractions_are_rounded():
    assert read(b"0.25 1 1 1\n100.75 2 2 0\n300.5 3 3 1\n")["t"].tolist() == [0, 101, 300]


def test_polarity_may_be_minus_one_or_a_word():
    events = sensor_events(50, 40)
    signed = events.copy()
    signed["p"] = 2 * signed["p"] - 1
    assert np.array_equal(read(encode_text(signed)), events)
    words = encode_text(events).replace(b" 1\n", b" True\n").replace(b" 0\n", b" false\n")
    assert np.array_equal(read(words), events)
    with pytest.raises(ValueError, match="has polarities -1, 0 and 1, expected 0 and 1, or -1 and 1"):
        read(b"1 1 1 1\n2 1 1 0\n3 1 1 -1\n")


NUMBERS = st.one_of(
    st.integers(-(10**14), 10**14).map(str),
    st.decimals(-(10**8), 10**8, places=6, allow_nan=False).map(lambda number: f"{number:f}"),
    st.sampled_from(
        ["0", "-1", "1", "007", "-0", "1.", ".5", "1e3", "-", "1-1", "2.5.5", "nan", "", "x", "+4", "0.10"]
    ),
)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(NUMBERS, NUMBERS), min_size=1, max_size=6))
def test_plain_numbers_are_those_of_numpy(rows):
    content = "\n".join(" ".join(row) for row in rows).encode()
    if (found := text._plain_columns(content, 2)) is not None:
        assert np.array_equal(np.array(found, float), text._columns(content, 2, "made"))


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 2**45), st.integers(0, 1000), st.integers(0, 1000), st.integers(0, 1)), min_size=1
    ),
    st.sampled_from([7, 40, 1 << 16]),
)
def test_named_columns_decode_to_the_encoded_events(rows, chunk_bytes):
    events = events_of(sorted(rows, key=lambda row: row[0]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text, "CHUNK", max(chunk_bytes, 40))
        assert np.array_equal(read(encode_text(events, "{x},{y},{p},{t}", "x,y,p,t\n")), events)


def test_line_cut_short_is_left_out_with_a_warning(caplog):
    assert len(read(b"1 1 1 1\n2 1 1 0\n3 1")) == 2
    assert "cut short in the middle of its last line" in caplog.text
    assert len(read(b"1 1 1 1\n2 1 1 0")) == 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"1 1 1 1\n2 1 1\n3 1 1 1\n", "made: .*number of columns.*; the file is damaged"),
        (b"1 1 1 1\n2 1 what 1\n3 1 1 1\n", "made: .*could not convert.*expected 4 numbers; the file is damaged"),
        (b"1 1 1 1\n2 1 nan 1\n", "value of y nan, expected a finite number"),
        (b"1 5 9 1\n2 5 9 7\n", "no column holds only 0 and 1, or -1 and 1"),
        (b"1 5 9 1\n" * 9000 + b"2 5 9 7\n", "event 9,000 .* has the polarity 7"),
        (b"x,y,p,t\n1,1,7,1\n", r"event 0 \(the first is 0\) has the polarity 7"),
        (b"x,y,p,t\n1,1,1,-5\n", r"event 0 .* has the time -5, expected 0 to"),
        (b"x,y,p,t\n1.5,1,1,5\n", "coordinate x 1.5, expected whole numbers of pixels"),
        (b"x,y,p,t\n-1,1,1,5\n", "column -1, row 1, expected a sensor"),
        (b"x,y,p,t\n1e30,1,1,5\n", "lies at column 2147483647, row 1"),
        (b"x,y,p,t\n1,1,1,1e300\n", "has the time 1e.300"),
        (b"x,y,p,t\n1,1,1\n", "names 4 columns and has 3"),
        (b"x,y,p,t\n", "hold no event, expected lines of t, x, y and p"),
        (b"1 1 1 1 1\n", "has 5 columns without names"),
        (b"99 77\n", "hold no event"),
        (b"0 0\n1 1 1 1\n", "its first line is '0 0'"),
        (b"hello there\n", "of no known format"),
        (b"1 1 1 1\n" * 30 + b"2" * 200_000, "a line has more than 65,536 bytes"),
    ],
)
def test_damaged_text_is_refused(content, message):
    with pytest.raises(ValueError, match=message):
        read(content)


def test_events_beside_the_sensor_are_counted_or_dropped():
    events = sensor_events(346, 260)
    events["x"][[10, 500, 900]] = 400
    with pytest.raises(ValueError, match="; 3 events of 2,000 lie beside it"):
        read(encode_text(events), sensor_size=(260, 346))
    assert len(read(encode_text(events), sensor_size=(260, 346), stray="drop")) == 1997


def test_names_with_the_sensors_size_are_read():
    """faery writes `t,x@346,y@260,on`."""
    content = b"t,x@346,y@260,on\n5,300,200,1\n9,2,3,0\n"
    with open_recording(NamedBytes(content, "a.csv")) as recording:
        assert recording.sensor_size == (260, 346)
        assert recording.format == "text"
    assert read_events(NamedBytes(content, "a.csv")).tolist() == [(5, 300, 200, 1), (9, 2, 3, 0)]
