"""AEDAT 2.0 and 3.1: recordings of a camera, round trips, and damaged files."""

import io
import struct
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parent))
from event_files import AEDAT2_HEADER, AEDAT31_HEADER, NamedBytes, encode_aedat2, events_of, packet, random_events

from multifire.events import aedat, open_recording, read_events, recording

SHARED = Path(__file__).parents[3] / "shared" / "data" / "dvs128-aedat2.zip"
THREE = [(100, 1, 2, 1), (200, 127, 0, 0), (300, 0, 127, 1)]


def read(content: bytes, name: str = "made") -> np.ndarray:
    return read_events(NamedBytes(content, name))


# Real recordings


@pytest.mark.skipif(not SHARED.is_file(), reason="the shared recordings of a DVS128 are not here")
def test_real_recordings_of_a_camera_are_decoded():
    with zipfile.ZipFile(SHARED) as file:
        contents = {name: file.read(name) for name in file.namelist()}
    assert len(contents) == 6
    for name, content in contents.items():
        payload = content
        while payload.startswith(b"#"):
            payload = payload[payload.index(b"\n") + 1 :]
        events = read(content, name)
        assert len(events) == len(payload) // 8, name
        assert len(payload) % 8 == 0, name
        assert (np.diff(events["t"]) >= 0).all(), name
        assert min(events["x"].min(), events["y"].min()) >= 0, name
        assert max(events["x"].max(), events["y"].max()) <= 127, name
        address = np.frombuffer(payload, ">u4")[::2].astype(int)
        assert (
            np.bincount(events["x"], minlength=128).tolist()
            == np.bincount(127 - (address >> 1 & 127), minlength=128).tolist()
        ), name
        assert np.bincount(events["p"]).tolist() == np.bincount(address & 1).tolist(), name


# Round trips

EVENTS = st.lists(
    st.tuples(st.integers(0, 2**31 - 1), st.integers(0, 127), st.integers(0, 127), st.integers(0, 1)),
    min_size=1,
    max_size=60,
)


@settings(max_examples=60, deadline=None)
@given(EVENTS)
def test_aedat2_decodes_to_the_encoded_events(rows):
    events = events_of(sorted(rows, key=lambda row: row[0]))
    assert np.array_equal(read(encode_aedat2(events)), events)


@settings(max_examples=60, deadline=None)
@given(st.lists(EVENTS, min_size=1, max_size=5), st.integers(0, 3), st.booleans())
def test_aedat31_decodes_to_the_encoded_events(packets, room, with_packets_to_skip):
    content, rows = AEDAT31_HEADER, []
    for number, part in enumerate(packets):
        shifted = [(t + (number << 31), x, y, p) for t, x, y, p in sorted(part)]
        rows += shifted
        content += packet(shifted, overflow=number, room=room)
        if with_packets_to_skip:
            content += packet([(5, 1, 1, 1)], kind=3, room=room) + packet(shifted[:1], overflow=number, valid=0)
    assert np.array_equal(read(content), events_of(rows))


@pytest.mark.parametrize("chunk_bytes", [8, 24, 4096])
def test_chunk_size_does_not_change_the_events(monkeypatch, chunk_bytes):
    events = random_events(500)
    events["t"][250:] += 1 << 31
    aedat31 = AEDAT31_HEADER + packet(events[:250], room=3) + packet([], kind=0) + packet(events[250:], overflow=1)
    for module in (recording, aedat):
        monkeypatch.setattr(module, "CHUNK_BYTES", chunk_bytes)
    assert np.array_equal(read(encode_aedat2(events)), events)
    assert np.array_equal(read(aedat31), events)


def test_header_may_have_any_length_and_any_line_ending():
    events = events_of(THREE)
    payload = encode_aedat2(events)[len(AEDAT2_HEADER) :]
    for header in (
        b"#!AER-DAT2.0\n",
        AEDAT2_HEADER * 400,
        b"#!AER-DAT2.0\n#" + b"x" * 1_200_000 + b"\n" + b"#\n" * 16_000,
    ):
        assert np.array_equal(read(header + payload), events)


def test_header_without_end_is_refused():
    with pytest.raises(ValueError, match="its header is longer than 16,777,216 bytes; not a recording"):
        read(b"#!AER-DAT2.0\n#" + b"x" * (17 << 20))
    for head in (b"#!AER-DAT2.0\n", b"#!AER-DAT3.1\n"):  # 8 million lines, of which only the permitted number is read
        with pytest.raises(ValueError, match="its header has more than 16,384 lines; not a recording"):
            read(head + b"#\n" * (1 << 23))


@pytest.mark.parametrize(
    ("line", "size"),
    [
        (b"#Source 1: DVS128", (128, 128)),
        (b"#Source 1: DAVIS240C", (180, 240)),
        (b"#-Source 0: DAVIS346bRed", (260, 346)),
        (b"#Source 1: other", None),
    ],
)
def test_aedat31_sensor_size_follows_from_the_camera_in_the_header(line, size):
    with open_recording(NamedBytes(b"#!AER-DAT3.1\r\n" + line + b"\r\n#!END-HEADER\r\n")) as opened:
        assert opened.sensor_size == size


def test_sensor_size_may_be_given():
    content = b"#!AER-DAT3.1\n#!END-HEADER\n" + packet([(1, 300, 200, 1)])
    assert read(content)["x"].tolist() == [300]
    with (
        open_recording(NamedBytes(content), sensor_size=(100, 400)) as opened,
        pytest.raises(ValueError, match=r"column 300, row 200, expected a sensor of 400 × 100"),
    ):
        list(opened.chunks())


def test_size_in_the_header_goes_before_a_given_one():
    content = b"#!AER-DAT3.1\n#Source 1: DVS128\n#!END-HEADER\n" + packet([(1, 30, 20, 1)])
    with open_recording(NamedBytes(content), sensor_size=(260, 346)) as opened:
        assert opened.sensor_size == (128, 128)


# Invalid input


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "made: is empty, expected a recording of events"),
        (AEDAT2_HEADER, "made: holds no event"),
        (AEDAT31_HEADER, "made: holds no event"),
        (AEDAT2_HEADER + b"1234567", "made: holds no event"),
        (AEDAT31_HEADER + packet(THREE, valid=0), "made: holds no event"),
        (AEDAT31_HEADER + packet(THREE, kind=2), "made: holds no event"),
        (b"nonsense" * 9, "of no known format: begins with b'nonsensenonsense', expected AEDAT 2.0"),
        (b"#!AER-DAT1.0\n" + bytes(80), "of no known format"),
        (
            AEDAT2_HEADER + struct.pack(">IIII", 2, 1, 0x10002, 2),
            r"event 1 \(the first is 0\) has address 0x10002, outside",
        ),
        (
            AEDAT31_HEADER + packet([(1, 0, 0, 0), (2, 128, 5, 1)]),
            r"event 1 .* column 128, row 5, expected a sensor of 128",
        ),
        (AEDAT31_HEADER + packet([(2, 5, 128, 1)]), r"event 0 .* column 5, row 128"),
        (
            AEDAT31_HEADER + packet(THREE, capacity=2),
            "the packet at byte 61 has 3 events in room for 2; the file is damaged",
        ),
        (AEDAT31_HEADER + packet([], overflow=1 << 21), "a clock that has overflowed 2,097,152 times"),
        (
            AEDAT31_HEADER + packet(THREE) + packet(THREE, source=2),
            "events of source 2 behind those of 1, expected one camera",
        ),
        (
            AEDAT31_HEADER + struct.pack("<HHIIIIII", 1, 1, 12, 4, 0, 1, 1, 1) + bytes(12),
            "events of 12 bytes with their time at 4",
        ),
    ],
)
def test_invalid_recording_is_refused(content, message):
    with pytest.raises(ValueError, match=message):
        read(content)


def test_missing_file_raises_file_not_found_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_events(tmp_path / "none.aedat")


@pytest.mark.parametrize("cut", range(1, 17))
def test_truncated_aedat2_keeps_the_complete_events(caplog, cut):
    events = read(encode_aedat2(THREE)[:-cut])
    assert np.array_equal(events, events_of(THREE)[: 3 - -(-cut // 8)])
    warnings = [text for text in caplog.messages if "cut short in the middle of an event" in text]
    assert len(warnings) == (cut % 8 > 0)


@pytest.mark.parametrize("cut", range(1, 24))
def test_truncated_aedat31_packet_keeps_the_complete_events(caplog, cut):
    first = packet(THREE)
    events = read((AEDAT31_HEADER + first + first)[:-cut])
    assert np.array_equal(events[np.argsort(events["t"], kind="stable")], events)
    assert len(events) == 6 - -(-cut // 8)
    assert len([text for text in caplog.messages if "cut short" in text]) == 1


def test_aedat31_truncated_in_a_packet_header_or_in_a_skipped_packet_keeps_the_events(caplog):
    for rest in (packet(THREE)[:20], packet(THREE, kind=3)[:40]):
        caplog.clear()
        assert np.array_equal(read(AEDAT31_HEADER + packet(THREE) + rest), events_of(THREE))
        assert len([text for text in caplog.messages if "cut short" in text]) == 1


@pytest.mark.parametrize("claimed", [4, 1000, 2**32 - 1])
def test_packet_that_claims_too_many_events_keeps_those_in_the_file(caplog, claimed):
    assert np.array_equal(read(AEDAT31_HEADER + packet(THREE, number=claimed)), events_of(THREE))
    assert f"which has 3 of its {claimed:,} events" in caplog.text


@pytest.mark.parametrize("pack", [encode_aedat2, lambda rows: AEDAT31_HEADER + packet(rows)])
def test_events_out_of_order_are_sorted_stably_with_a_warning(caplog, pack):
    rows = [(500, 1, 0, 0), (300, 2, 0, 0), (400, 3, 0, 0), (300, 4, 0, 0), (500, 5, 0, 0)]
    events = read(pack(rows))
    assert events["t"].tolist() == [300, 300, 400, 500, 500]
    assert events["x"].tolist() == [2, 4, 3, 1, 5]
    assert [text for text in caplog.messages if "time runs backwards 2 times; its events were sorted" in text]


def test_aedat2_clock_may_wrap():
    t = [2**32 - 20, 2**32 - 10, 2**32 + 5, 2**32 + 5, 2**33 - 3, 2**33 + 1]
    t.insert(4, 2**32 + 2**31)  # without it a step would exceed half of the clock's range and be taken for a step back
    events = events_of([(stamp, 1, 1, 1) for stamp in t])
    assert np.array_equal(read(encode_aedat2(events)), events)


def test_aedat2_clock_may_step_back_across_its_wrap(caplog):
    events = read(
        encode_aedat2([(2**32 - 5, 1, 0, 0), (2**32 + 3, 2, 0, 0), (2**32 - 2, 3, 0, 0), (2**32 + 9, 4, 0, 0)])
    )
    assert events["t"].tolist() == [2**32 - 5, 2**32 - 2, 2**32 + 3, 2**32 + 9]
    assert events["x"].tolist() == [1, 3, 2, 4]


def test_aedat31_overflow_extends_the_clock():
    rows = [(2**31 - 1, 1, 1, 1), (2**31 + 4, 2, 2, 0)]
    assert np.array_equal(read(AEDAT31_HEADER + packet(rows[:1]) + packet(rows[1:], overflow=1)), events_of(rows))


def test_special_and_invalid_events_are_skipped():
    special = AEDAT2_HEADER + struct.pack(">IIIIII", 2, 1, 0x8000, 2, 3, 4)
    assert read(special)["t"].tolist() == [1, 4]
    mixed = AEDAT31_HEADER + packet(THREE[:1]) + packet(THREE[1:2], valid=0) + packet(THREE, kind=0) + packet(THREE[2:])
    assert np.array_equal(read(mixed), events_of([THREE[0], THREE[2]]))


def test_pipe_is_read_like_a_file():
    class Pipe(io.RawIOBase):
        def __init__(self, content):
            self.remaining = content

        def readable(self):
            return True

        def readinto(self, buffer):
            part, self.remaining = self.remaining[:7], self.remaining[7:]
            buffer[: len(part)] = part
            return len(part)

    events = random_events(200)
    for content in (encode_aedat2(events), AEDAT31_HEADER + packet(events)):
        assert np.array_equal(read_events(Pipe(content)), events)
