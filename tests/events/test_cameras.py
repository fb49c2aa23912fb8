"""AEDAT4, EVT2 and EVT3: files that faery writes, EVT2 that is packed by hand, damage, and a library that fails."""

import io
import os
import struct
import sys
import textwrap
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from multifire.events import FrameOptions, cameras, frames_of_windows, open_recording, read_events

WRITTEN = [("made.aedat4", {}), ("made.raw", {"version": "evt2"}), ("made.raw", {"version": "evt3"})]
EVT2 = b"% evt 2.0\n% format EVT2;width=34;height=20\n% geometry 34x20\n"


@pytest.fixture(autouse=True)
def _no_process_stays():
    before = children()  # another test's library may keep one
    yield
    assert children() <= before


def children() -> set[str]:
    """The numbers and names of the processes that this one has started and not waited for."""
    found = set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            name, _, rest = stat.read_text().rpartition(")")
        except OSError:  # ended meanwhile
            continue
        if int(rest.split()[1]) == os.getpid():
            found.add(name)
    return found


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
    monkeypatch.setitem(sys.modules, "faery", None)
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


@pytest.fixture
def sound(faery, tmp_path) -> tuple[bytes, np.ndarray]:
    """A sound AEDAT4 file of one packet, and its events."""
    written = write(faery, tmp_path / "sound.aedat4", {})
    return (tmp_path / "sound.aedat4").read_bytes(), written


HEAD_AT = 14
PACKET_AT = 0x2C6
"""Where the first packet begins in what faery writes: its track, its size, then its compressed bytes."""


@pytest.mark.parametrize("size", [0x10000000, 0xFFFFFFFF])
@pytest.mark.parametrize("at", [HEAD_AT, PACKET_AT + 4, PACKET_AT + 8, PACKET_AT + 15])
def test_a_size_that_is_not_true_does_no_harm(sound, tmp_path, at, size):
    content = sound[0]
    (tmp_path / "a.aedat4").write_bytes(content[:at] + struct.pack("<I", size) + content[at + 4 :])
    with pytest.raises(ValueError, match=r"a\.aedat4: "):
        read_events(tmp_path / "a.aedat4")


def test_what_is_cut_within_a_packet_keeps_those_before_it(faery, tmp_path, caplog):
    events = np.zeros(9000, faery.EVENTS_DTYPE)  # faery writes packets of 4,096
    events["t"] = np.arange(9000)
    faery.events_stream_from_array(events, dimensions=(34, 20)).to_file(tmp_path / "whole.aedat4")
    content = (tmp_path / "whole.aedat4").read_bytes()
    (tmp_path / "a.aedat4").write_bytes(content[: len(content) * 3 // 4])
    assert len(read_events(tmp_path / "a.aedat4")) == 4096
    assert [record.getMessage() for record in caplog.records] == [
        f"{tmp_path}/a.aedat4: cut short within a packet; all whole packets before it are kept"
    ]


@pytest.mark.parametrize("kept", [15, 100, 500])
def test_what_is_cut_within_its_head_is_refused(sound, tmp_path, kept):
    (tmp_path / "a.aedat4").write_bytes(sound[0][:kept])
    with pytest.raises(ValueError, match=r"a\.aedat4: cannot be read: .*; the file is damaged or cut short"):
        read_events(tmp_path / "a.aedat4")


@pytest.mark.parametrize("seed", range(6))
def test_turned_bytes_do_no_harm(sound, tmp_path, seed):
    rng = np.random.default_rng(seed)
    content = np.frombuffer(sound[0], np.uint8).copy()
    content[rng.integers(14, len(content), 4)] = rng.integers(0, 256, 4)
    (tmp_path / "a.aedat4").write_bytes(content.tobytes())
    try:
        events = read_events(tmp_path / "a.aedat4")
    except ValueError as error:
        events, said = None, str(error)
    if events is None:
        assert said.startswith(f"{tmp_path}/a.aedat4: ")
    else:
        assert events["t"].min() >= 0
        assert events["x"].max() < 34


def test_what_is_left_in_the_middle_ends_its_process(faery, tmp_path):
    write(faery, tmp_path / "a.aedat4", {})
    before = children()
    with open_recording(tmp_path / "a.aedat4") as recording:
        next(recording.packed())
        assert len(children() - before) == 1


def test_frames_are_counted_in_two_passes(faery, tmp_path):
    written = write(faery, tmp_path / "a.aedat4", {})
    options = FrameOptions(size=(20, 34), timesteps=3, slicing="count")
    frames = frames_of_windows(lambda: open_recording(tmp_path / "a.aedat4"), [(None, None)], options)[0]
    assert frames.counts.astype(int).sum(axis=(1, 2, 3)).tolist() == [1000, 1000, 1000]
    assert frames.events == len(written)


LIBRARY = """
    import os, signal, sys, types
    import numpy as np
    class Decoder:
        version, dimensions = "evt2", {dimensions}
        def __init__(self, *_): pass
        def __iter__(self): return self
        def __next__(self):
            events = np.zeros(1000, [("t", "<u8"), ("x", "<u2"), ("y", "<u2"), ("on", "u1")])
            {packet}
            return {{"events": events}}
    evt = types.SimpleNamespace(Decoder=Decoder)
"""


@pytest.mark.parametrize(
    ("packet", "error"),
    [
        ("while True: pass", "takes far longer to decode than a sound file of its size; the file is damaged"),
        ("self.x = getattr(self, 'x', 0) + 1; events = events[self.x:]; sum(range(1_000_000))", "takes far longer"),
        ("os.abort()", r"ends the process that decodes it \(SIGABRT\), which may take 64 MB; the file is damaged"),
        ("os._exit(3)", r"ends the process that decodes it \(code 3\)"),
        ("bytearray(100_000_000)", "cannot be read: MemoryError; the file is damaged or cut short"),
        ("pass", "holds more than 196,608 events in 60 bytes, more than any camera's; the file is damaged"),
        ("events['t'] = 1 << 63", "an event has the time -9,223,372,036,854,775,808 µs; the file is damaged"),
        ("events['x'][7] = 40", r"event 7 \(the first is 0\) lies at column 40, row 0, expected a sensor of 34 × 20"),
        ("raise KeyError('x' * 70_000)", "cannot be read: 'xxx"),
        ("class PanicException(BaseException): pass\n            raise PanicException('oh')", "cannot be read: oh"),
    ],
)
def test_a_library_that_fails_is_one_error(tmp_path, monkeypatch, packet, error):
    """In place of faery one that does what damaged files can make a library do, whichever they are of its versions."""
    stand_in(tmp_path, monkeypatch, packet)
    tracemalloc.start()
    began = time.monotonic()
    with pytest.raises(ValueError, match=rf"a\.raw: {error}"):
        read_events(tmp_path / "a.raw")
    assert time.monotonic() - began < 30  # what it computes is limited; the machine may be busy
    assert tracemalloc.get_traced_memory()[1] < 10_000_000
    tracemalloc.stop()


def stand_in(tmp_path, monkeypatch, packet: str, dimensions=(34, 20)) -> None:
    folder = tmp_path / "library"
    folder.mkdir()
    (folder / "faery.py").write_text(textwrap.dedent(LIBRARY.format(packet=packet, dimensions=dimensions)))
    (tmp_path / "a.raw").write_bytes(EVT2)
    monkeypatch.setenv("PYTHONPATH", str(folder))
    monkeypatch.syspath_prepend(folder)


def test_a_sensor_that_is_none_is_refused(tmp_path, monkeypatch):
    stand_in(tmp_path, monkeypatch, "pass", (65535, 20))
    with pytest.raises(ValueError, match="says that its sensor has 65535 × 20 pixels, expected 1 to 4096 a side"):
        read_events(tmp_path / "a.raw")


def test_any_value_but_0_is_an_event_of_polarity_1(tmp_path, monkeypatch):
    once = "events['on'][3:] = 255\n            if hasattr(self, 'x'): raise StopIteration\n            self.x = 1"
    stand_in(tmp_path, monkeypatch, once)
    assert read_events(tmp_path / "a.raw")["p"].tolist() == [0] * 3 + [1] * 997


def test_a_pipe_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="pipe: aedat4 is read from a file of its own only; write it to one first"):
        cameras.open_camera_file(tmp_path / "pipe", "aedat4")


def test_what_lies_in_the_current_folder_is_not_run(faery, tmp_path, monkeypatch):
    write(faery, tmp_path / "a.aedat4", {})
    (tmp_path / "json.py").write_text("raise SystemExit('run')")
    monkeypatch.chdir(tmp_path)
    assert len(read_events("a.aedat4")) == 3000
