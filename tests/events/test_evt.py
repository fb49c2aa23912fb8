"""EVT2 and EVT3: encoded by hand from the specification, and written by faery."""

import numpy as np
import pytest

from multifire.events import open_recording, read_events
from tests.events.event_files import NamedBytes

EVT2 = b"% evt 2.0\n% format EVT2;height=20;width=34\n% geometry 34x20\n% end\n"
EVT3 = b"% evt 3.0\n% format EVT3;height=480;width=640\n% end\n"


def evt2(*words: int, header: bytes = EVT2) -> NamedBytes:
    return NamedBytes(header + np.array(words, "<u4").tobytes(), "a.raw")


def evt3(*words: int, header: bytes = EVT3) -> NamedBytes:
    return NamedBytes(header + np.array(words, "<u2").tobytes(), "a.raw")


def rows(events: np.ndarray) -> list[tuple[int, ...]]:
    return [tuple(row) for row in events.tolist()]


def of_evt2(t: int, x: int, y: int, p: int) -> list[int]:
    return [8 << 28 | t >> 6, p << 28 | (t & 63) << 22 | x << 11 | y]


def test_evt2_encoded_by_hand_is_read():
    """CD_OFF (0) and CD_ON (1): 4 bits of type, 6 of time, 11 of x, 11 of y; TIME_HIGH (8): upper 28 bits of time."""
    expected = [(64, 3, 0, 1), (70, 33, 19, 0), (128, 0, 7, 1), ((1 << 33) + 5, 2, 2, 1)]
    words = [word for row in expected for word in of_evt2(*row)]
    with_others = [0x1000_0801, *words[:2], 10 << 28 | 77, 14 << 28, *words[2:]]  # an event without time, two triggers
    assert rows(read_events(evt2(*with_others))) == expected


def test_evt2_clock_turns():
    """Its 34 bits begin anew after 4 hours and 46 minutes."""
    words = [*of_evt2((1 << 34) - 2, 1, 1, 1), 8 << 28, of_evt2(7, 1, 1, 1)[1]]
    assert read_events(evt2(*words))["t"].tolist() == [(1 << 34) - 2, (1 << 34) + 7]


def test_evt3_encoded_by_hand_is_read():
    words = [
        0x2005,  # without a time
        0x8001, 0x6003,  # t = 4096 + 3
        7, 0x2000 | 1 << 11 | 300,  # y 7; x 300 ON
        0x3000 | 100, 0x4000 | 0b1000_0000_0001, 0x5000 | 0b1000_0001,  # x 100 and 111; 112 and 119
        0xE123,  # another kind
        0x6009, 0x5000 | 1,  # later; the vector goes on at 120
        8, 0x3000 | 1 << 11 | 5, 0x4000 | 2,
        0x8002, 0x2000 | 9,  # t = 8192
    ]  # fmt: skip
    expected = [
        (4099, 300, 7, 1),
        (4099, 100, 7, 0), (4099, 111, 7, 0), (4099, 112, 7, 0), (4099, 119, 7, 0),
        (4105, 120, 7, 0),
        (4105, 6, 8, 1),
        (8192, 9, 8, 0),
    ]  # fmt: skip
    assert rows(read_events(evt3(*words))) == expected
    with open_recording(evt3(*words)) as recording:
        assert (recording.format, recording.sensor_size) == ("evt3", (480, 640))


def test_evt3_clock_turns():
    """Its 24 bits begin anew after 16.8 s."""
    words = [0x8FFF, 0x6FFF, 1, 0x2001, 0x8000, 0x6002, 0x2001]
    assert read_events(evt3(*words))["t"].tolist() == [(1 << 24) - 1, (1 << 24) + 2]


@pytest.mark.parametrize("chunk", [4, 62, 1 << 15])
def test_state_holds_between_reads(monkeypatch, chunk):
    rng = np.random.default_rng(0)
    kinds = rng.choice([0, 2, 3, 4, 5, 6, 8], 4000) << 12
    words = (kinds | rng.integers(0, 400, 4000)).tolist()
    expected = read_events(evt3(*words))
    monkeypatch.setattr("multifire.events.evt.CHUNK", chunk)
    assert len(expected) > 1000
    assert np.array_equal(read_events(evt3(*words)), expected)


@pytest.mark.parametrize("make", [lambda: evt2(*of_evt2(64, 34, 0, 1), *of_evt2(64, 1, 20, 1), *of_evt2(64, 1, 1, 1)),
                                  lambda: evt3(0x8001, 0, 0x2000 | 640, 480, 0x2001, 1, 0x2001)])  # fmt: skip
def test_events_beside_the_sensor_are_counted(make, caplog):
    with pytest.raises(ValueError, match="; 2 events of 3 lie beside it"):
        read_events(make())
    assert rows(read_events(make(), stray="drop"))[0][1:3] == (1, 1)
    assert "2 events beside the sensor" in caplog.text


@pytest.mark.parametrize("header", [EVT2, EVT3])
@pytest.mark.parametrize("rest", [b"", b"\x05"])
def test_a_file_without_a_whole_word_is_refused(header, rest):
    """Found by tools/fuzz_events.py: a lone byte ended in an IndexError."""
    with pytest.raises(ValueError, match="holds no event"):
        read_events(NamedBytes(header + rest, "a.raw"))


def test_size_comes_from_the_header_or_the_user():
    bare = evt2(*of_evt2(64, 3, 0, 1), header=b"% evt 2.0\n% end\n")
    with open_recording(bare, sensor_size=(20, 34)) as recording:
        assert recording.sensor_size == (20, 34)
    lines = evt2(*of_evt2(64, 3, 0, 1), header=b"% Height 30\n% Width 40\n% evt 2.0\n")
    with open_recording(lines) as recording:
        assert recording.sensor_size == (30, 40)


@pytest.mark.parametrize("header", [b"% evt 2.1\n% end\n", b"% format EVT21;height=720;width=1280\n% end\n"])
def test_other_versions_are_refused(header):
    with pytest.raises(ValueError, match=r"a\.raw: is EVT 2\.?1, expected EVT 2\.0 or 3\.0; convert it with"):
        read_events(evt2(*of_evt2(64, 3, 0, 1), header=header))


def test_header_without_end_is_refused():
    with pytest.raises(ValueError, match="its header has more than 256 lines; not a recording"):
        read_events(evt2(header=b"% evt 2.0\n" * 300))


@pytest.mark.parametrize("version", ["evt2", "evt3"])
def test_files_written_by_faery_are_read(tmp_path, version):
    faery = pytest.importorskip("faery", reason="the extra `cameras` is not installed")
    rng = np.random.default_rng(0)
    written = np.zeros(3000, faery.EVENTS_DTYPE)
    written["t"] = np.sort(rng.integers(0, 40_000_000, 3000))
    written["t"][0] = 0  # faery counts from the first event
    written["x"], written["y"] = rng.integers(0, 34, 3000), rng.integers(0, 20, 3000)
    written["on"] = rng.random(3000) < 0.5
    faery.events_stream_from_array(written, dimensions=(34, 20)).to_file(tmp_path / "a.raw", version=version)
    events = read_events(tmp_path / "a.raw")
    for ours, theirs in (("t", "t"), ("x", "x"), ("y", "y"), ("p", "on")):
        assert np.array_equal(events[ours], written[theirs].astype(int)), ours
    with open_recording(tmp_path / "a.raw") as recording:
        assert recording.sensor_size == (20, 34)
