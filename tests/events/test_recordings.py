import io
import logging
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from multifire import events as ev
from multifire.events import aedat, recording

SHARED = Path(__file__).parents[3] / "shared" / "data"
HEAD_2 = b"#!AER-DAT2.0\r\n# more\r\n"
HEAD_31 = b"#!AER-DAT3.1\r\n#Format: RAW\r\n#Source 1: DVS128\r\n#!END-HEADER\r\n"
COLUMNS = ("t", "x", "y", "p")
RECORDED = {
    "walking_1": 19_182,
    "walking_2": 70_304,
    "clamp_right": 110_228,
    "standing_up_1": 155_766,
    "standing_up_2": 209_564,
    "clamp_left": 323_902,
}


def aedat2(t, x, y, p) -> bytes:
    return HEAD_2 + np.stack([y << 8 | (127 - x) << 1 | p, t], 1).astype(">u4").tobytes()


def packet(t, x, y, p, *, kind=1, overflow=0, number=None, source=1, valid=1, size=8, offset=4) -> bytes:
    number = len(t) if number is None else number
    head = np.array([kind | source << 16, size, offset, overflow, number, number, number], "<u4").tobytes()
    return head + np.stack([x << 17 | y << 2 | p << 1 | valid, t], 1).astype("<u4").tobytes()


def aedat31(*columns) -> bytes:
    half = len(columns[0]) // 2
    special = np.array([1 << 16, 8, 4, 0, 1, 1, 1, 3, 0], "<u4").tobytes()
    first, second = ([column[part] for column in columns] for part in (slice(half), slice(half, None)))
    return HEAD_31 + packet(*first) + special + packet(*second)


def nmnist(t, x, y, p) -> bytes:
    return np.stack([x, y, p << 7 | t >> 16, t >> 8 & 255, t & 255], 1).astype(np.uint8).tobytes()


MAKERS = {"aedat2": (aedat2, 128), "aedat3.1": (aedat31, 128), "nmnist": (nmnist, 34)}


def make_columns(count: int, side: int, seed: int = 0) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(seed)
    t = np.sort(rng.integers(0, 1 << 23, count))
    return t, rng.integers(0, side, count), rng.integers(0, side, count), rng.integers(0, 2, count)


def read(content: bytes) -> np.ndarray:
    return ev.read_events(io.BytesIO(content))


def check(found: np.ndarray, expected: tuple[np.ndarray, ...]) -> None:
    assert found.dtype == ev.EVENT_DTYPE
    for name, column in zip(COLUMNS, expected, strict=True):
        assert found[name].tolist() == column.tolist()


@pytest.mark.parametrize("format", MAKERS)
@settings(max_examples=40, deadline=None)
@given(count=st.integers(1, 300), seed=st.integers(0, 1 << 30), chunk=st.sampled_from([40, 80, 1 << 18]))
def test_what_was_written_is_read_in_chunks_of_any_size(format, count, seed, chunk):
    make, side = MAKERS[format]
    columns = make_columns(count, side, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recording, "CHUNK_BYTES", chunk)
        patch.setattr(aedat, "CHUNK_BYTES", chunk)
        check(read(make(*columns)), columns)


@pytest.mark.parametrize("format", MAKERS)
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_damaged_bytes_are_read_or_refused(format, data):
    make, side = MAKERS[format]
    content = bytearray(make(*make_columns(30, side)))
    for _ in range(data.draw(st.integers(0, 5))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    content = content[: data.draw(st.integers(0, len(content)))]
    try:
        found = read(bytes(content))
    except ValueError:
        return
    assert len(found) > 0
    assert (np.diff(found["t"]) >= 0).all()


@pytest.mark.parametrize("format", MAKERS)
def test_a_cut_keeps_whole_events_and_warns_once(format, caplog):
    make, side = MAKERS[format]
    columns = make_columns(20, side)
    with caplog.at_level(logging.WARNING, logger="multifire"):
        check(read(make(*columns)[:-3]), tuple(column[:-1] for column in columns))
    assert len(caplog.messages) == 1
    assert "cut short" in caplog.text


@pytest.mark.parametrize("format", MAKERS)
@pytest.mark.parametrize("chunk", [40, 1 << 18])
def test_time_that_runs_backwards_is_sorted_stably_and_told(format, chunk, caplog, monkeypatch):
    monkeypatch.setattr(recording, "CHUNK_BYTES", chunk)
    monkeypatch.setattr(aedat, "CHUNK_BYTES", chunk)
    make, side = MAKERS[format]
    t, x, y, p = make_columns(60, side)
    t = np.random.default_rng(1).permutation(t // 100_000)
    order = np.argsort(t, kind="stable")
    with caplog.at_level(logging.WARNING, logger="multifire"):
        check(read(make(t, x, y, p)), tuple(column[order] for column in (t, x, y, p)))
    assert len(caplog.messages) == 1
    assert "backwards" in caplog.text


def test_aedat2_time_that_wraps_goes_on():
    steps = np.array([(1 << 32) - 10, (1 << 32) - 5, 3, 8, 1 << 31, (1 << 32) - 1, 4])
    zeros = np.zeros(len(steps), int)
    expected = steps + (1 << 32) * np.array([0, 0, 1, 1, 1, 1, 2])
    assert read(aedat2(steps, zeros, zeros, zeros))["t"].tolist() == expected.tolist()


def test_aedat2_leaves_out_marks_that_are_no_pixels():
    content = HEAD_2 + np.array([[5, 1], [0x8005, 2], [7, 3]], ">u4").tobytes()
    assert read(content)["t"].tolist() == [1, 3]


def test_aedat31_overflow_and_invalid_events():
    columns = make_columns(4, 128)
    content = HEAD_31 + packet(*columns) + packet(*columns, valid=0) + packet(*columns, overflow=2)
    found = read(content)
    assert found["t"].tolist() == [*columns[0], *(columns[0] + (2 << 31))]


def test_nmnist_overflow_marks_add_8192_each():
    t, x, y = np.array([5, 0, 6, 0, 0, 7]), np.array([1, 0, 2, 0, 0, 3]), np.array([1, 240, 2, 240, 240, 3])
    assert read(nmnist(t, x, y, np.ones(6, int)))["t"].tolist() == [5, 6 + 8192, 7 + 3 * 8192]


COLUMNS_4 = make_columns(4, 128)
OUTSIDE = (COLUMNS_4[0], COLUMNS_4[1] + 200, *COLUMNS_4[2:])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (HEAD_2, "holds no event"),
        (HEAD_31, "holds no event"),
        (HEAD_31 + packet(*COLUMNS_4, valid=0), "holds no event"),
        (b"hello, world", "no known format"),
        (b"#!AER-DAT1.0\r\n1234", "no known format"),
        (HEAD_2 + np.array([[1 << 20, 1]], ">u4").tobytes(), "event 0 .* address 0x100000"),
        (HEAD_31 + packet(*OUTSIDE), "expected a sensor of 128 × 128"),
        (HEAD_31 + packet(*COLUMNS_4, size=12), "expected 8 and 4"),
        (HEAD_31 + packet(*COLUMNS_4, overflow=1 << 21), "overflowed"),
        (HEAD_31 + packet(*COLUMNS_4) + packet(*COLUMNS_4, source=2), "expected one camera"),
        (HEAD_2 + b"#" * (recording.MAX_HEADER + 1), "header is longer"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path, content, message):
    path = tmp_path / "a.aedat"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        ev.read_events(path)
    assert str(error.value).startswith(str(path))


def test_nmnist_by_its_name_with_a_coordinate_outside():
    with pytest.raises(ValueError, match="34 × 34"), ev.open_recording(io.BytesIO(b"\x30" * 10), "a.bin") as opened:
        list(opened.chunks())


def test_a_packet_that_claims_more_than_the_file_holds(caplog):
    with caplog.at_level(logging.WARNING, logger="multifire"):
        check(read(HEAD_31 + packet(*COLUMNS_4, number=1 << 31)), COLUMNS_4)
    assert len(caplog.messages) == 1


def test_a_missing_file():
    with pytest.raises(FileNotFoundError):
        ev.read_events("nothing-here.aedat")


@pytest.mark.skipif(not (SHARED / "dvs128-aedat2.zip").exists(), reason="shared/data/dvs128-aedat2.zip is absent")
@pytest.mark.parametrize("name", RECORDED)
def test_real_dvs128_recordings_straight_from_their_archive(name):
    with zipfile.ZipFile(SHARED / "dvs128-aedat2.zip") as archive:
        raw = archive.read(f"{name}.aedat")
        with archive.open(f"{name}.aedat") as file:
            found = ev.read_events(file)
    payload = raw[raw.index(b"#End of Preferences for this AEChip\r\n") + 37 :]
    assert len(found) == len(payload) // 8 == RECORDED[name]
    assert min(found["x"].min(), found["y"].min()) >= 0
    assert max(found["x"].max(), found["y"].max()) <= 127


@pytest.mark.skipif(not (SHARED / "nmnist-1100.zip").exists(), reason="shared/data/nmnist-1100.zip is absent")
def test_real_nmnist_recordings():
    with zipfile.ZipFile(SHARED / "nmnist-1100.zip") as archive:
        names = [name for name in archive.namelist() if name.endswith(".bin")]
        assert len(names) == 1100
        for name in names:
            content = archive.read(name)
            assert len(read(content)) == len(content) // 5


@pytest.mark.parametrize("kind", ["evt2", "evt3", "aedat4"])
def test_files_that_faery_writes(tmp_path, kind):
    faery = pytest.importorskip("faery", reason="the extra `cameras` is not installed")
    columns = make_columns(3000, 480)
    made = np.zeros(3000, faery.EVENTS_DTYPE)
    for name, column in zip(("t", "x", "y", "on"), columns, strict=True):
        made[name] = column
    path = tmp_path / f"a.{'aedat4' if kind == 'aedat4' else 'raw'}"
    if kind == "aedat4":
        faery.events_stream_from_array(made, (640, 480)).to_file(path)
    else:
        with faery.evt.Encoder(path, kind, False, (640, 480), True) as encoder:
            encoder.write({"events": made})
    with ev.open_recording(path) as opened:
        assert (opened.format, opened.sensor_size) == (kind, (480, 640))
    check(ev.read_events(path), columns)
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(ValueError, match=r"a\."):
        ev.read_events(path)
