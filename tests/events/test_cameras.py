"""AEDAT4, EVT2 and EVT3: files that faery writes, and EVT2 that is packed by hand."""

import io
import struct

import numpy as np
import pytest

from multifire.events import cameras, open_recording, read_events

WRITTEN = [("made.aedat4", {}), ("made.raw", {"version": "evt2"}), ("made.raw", {"version": "evt3"})]
EVT2 = b"% evt 2.0\n% format EVT2;width=34;height=20\n% geometry 34x20\n"


@pytest.fixture
def faery():
    return pytest.importorskip("faery", reason="the extra `cameras` is not installed")


def write(faery, path, options) -> np.ndarray:
    rng = np.random.default_rng(0)
    events = np.zeros(3000, faery.EVENTS_DTYPE)
    events["t"] = np.sort(rng.integers(0, 500_000, 3000))
    events["t"][0] = 0
    events["x"], events["y"], events["on"] = (
        rng.integers(0, 34, 3000),
        rng.integers(0, 20, 3000),
        rng.random(3000) < 0.5,
    )
    faery.events_stream_from_array(events, dimensions=(34, 20)).to_file(path, **options)
    return events


@pytest.mark.parametrize(("name", "options"), WRITTEN)
def test_what_faery_writes_is_read(faery, tmp_path, name, options):
    written = write(faery, tmp_path / name, options)
    with open_recording(tmp_path / name) as recording:
        assert recording.sensor_size == (20, 34)
        assert recording.format == options.get("version", "aedat4")
    events = read_events(tmp_path / name)
    for ours, theirs in (("t", "t"), ("x", "x"), ("y", "y"), ("p", "on")):
        assert np.array_equal(events[ours], written[theirs].astype(int)), ours


def test_evt2_by_hand(faery, tmp_path):
    """CD_OFF 0 and CD_ON 1 of four bits, six of time, eleven of x and of y; TIME_HIGH 8 sets the time's upper 28."""
    rows = [(64, 3, 0, 1), (70, 33, 19, 0), (128, 0, 7, 1)]
    words = []
    for t, x, y, p in rows:
        words += [8 << 28 | t >> 6, p << 28 | (t & 63) << 22 | x << 11 | y]
    (tmp_path / "a.raw").write_bytes(EVT2 + struct.pack(f"<{len(words)}I", *words))
    events = read_events(tmp_path / "a.raw")
    assert [tuple(event)[1:] for event in events.tolist()] == [row[1:] for row in rows]
    assert np.diff(events["t"]).tolist() == [6, 58]


@pytest.mark.parametrize("content", [b"#!AER-DAT4.0\r\n", b"#!AER-DAT4.0\r\n" + bytes(200), EVT2])
def test_what_holds_no_events_is_refused(faery, tmp_path, content):
    (tmp_path / "a.raw").write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.raw"):
        read_events(tmp_path / "a.raw")


def test_without_faery_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "faery", None)
    (tmp_path / "a.raw").write_bytes(EVT2)
    with pytest.raises(ValueError, match=r"reading evt needs the library faery; pip install 'multifire\[cameras\]'"):
        read_events(tmp_path / "a.raw")


def test_a_stream_is_refused():
    with pytest.raises(ValueError, match="aedat4 is read from a file of its own only; unpack it first"):
        read_events(io.BytesIO(b"#!AER-DAT4.0\r\n"))


@pytest.mark.parametrize(
    ("head", "kind"),
    [(b"#!AER-DAT4.0\r\n", "aedat4"), (b"% a\n% evt 3.0\n", "evt"), (b"% format EVT2;x", "evt"), (b"% no\n", None)],
)
def test_formats_are_told_by_content(head, kind):
    assert cameras.kind_of(head) == kind
