"""AEDAT4: files written by faery, damaged files, and a decoder that fails."""

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

from multifire.events import FrameOptions, aedat4, frames_of_windows, open_recording, read_events

AEDAT4 = b"#!AER-DAT4.0\r\n"


@pytest.fixture(autouse=True)
def _no_child_process_remains():
    before = children()  # an earlier test may have left some
    yield
    assert children() <= before


def children() -> set[str]:
    """Return the ids and names of the child processes of this process that have not been waited for."""
    found = set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            name, _, rest = stat.read_text().rpartition(")")
        except OSError:  # the process has ended in the meantime
            continue
        if int(rest.split()[1]) == os.getpid():
            found.add(name)
    return found


@pytest.fixture
def faery():
    return pytest.importorskip("faery", reason="the extra `cameras` is not installed")


def write_recording(faery, path) -> np.ndarray:
    rng = np.random.default_rng(0)
    events = np.zeros(3000, faery.EVENTS_DTYPE)
    events["t"] = np.sort(rng.integers(0, 500_000, 3000))
    events["t"][0] = 0
    events["x"], events["y"], events["on"] = (
        rng.integers(0, 34, 3000),
        rng.integers(0, 20, 3000),
        rng.random(3000) < 0.5,
    )
    faery.events_stream_from_array(events, dimensions=(34, 20)).to_file(path)
    return events


def test_file_written_by_faery_is_read(faery, tmp_path):
    path = tmp_path / "made.aedat4"
    written = write_recording(faery, path)
    with open_recording(path) as recording:
        assert recording.sensor_size == (20, 34)
        assert recording.format == "aedat4"
    events = read_events(path)
    for ours, theirs in (("t", "t"), ("x", "x"), ("y", "y"), ("p", "on")):
        assert np.array_equal(events[ours], written[theirs].astype(int)), ours


@pytest.mark.parametrize("content", [AEDAT4, AEDAT4 + bytes(200)])
def test_file_without_events_is_refused(faery, tmp_path, content):
    (tmp_path / "a.aedat4").write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.aedat4"):
        read_events(tmp_path / "a.aedat4")


def test_error_without_faery_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "faery", None)
    (tmp_path / "a.aedat4").write_bytes(AEDAT4)
    with pytest.raises(ValueError, match=r"reading AEDAT4 needs the library faery; pip install 'multifire\[cameras\]'"):
        read_events(tmp_path / "a.aedat4")


def test_stream_is_refused():
    with pytest.raises(ValueError, match="AEDAT4 is read from a file of its own only; unpack it first"):
        read_events(io.BytesIO(b"#!AER-DAT4.0\r\n"))


@pytest.fixture
def intact_file(faery, tmp_path) -> tuple[bytes, np.ndarray]:
    """Return the bytes of an intact AEDAT4 file with one packet, and its events."""
    written = write_recording(faery, tmp_path / "intact.aedat4")
    return (tmp_path / "intact.aedat4").read_bytes(), written


HEADER_OFFSET = 14
PACKET_OFFSET = 0x2C6
"""Offset of the first packet in a file that faery writes: its track, its size, then its compressed bytes."""


@pytest.mark.parametrize("size", [0x10000000, 0xFFFFFFFF])
@pytest.mark.parametrize("offset", [HEADER_OFFSET, PACKET_OFFSET + 4, PACKET_OFFSET + 8, PACKET_OFFSET + 15])
def test_wrong_size_field_is_an_error(intact_file, tmp_path, offset, size):
    content = intact_file[0]
    (tmp_path / "a.aedat4").write_bytes(content[:offset] + struct.pack("<I", size) + content[offset + 4 :])
    with pytest.raises(ValueError, match=r"a\.aedat4: "):
        read_events(tmp_path / "a.aedat4")


def test_file_truncated_in_a_packet_keeps_the_packets_before_it(faery, tmp_path, caplog):
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
def test_file_truncated_in_its_header_is_refused(intact_file, tmp_path, kept):
    (tmp_path / "a.aedat4").write_bytes(intact_file[0][:kept])
    with pytest.raises(ValueError, match=r"a\.aedat4: cannot be read: .*; the file is damaged or cut short"):
        read_events(tmp_path / "a.aedat4")


@pytest.mark.parametrize("seed", range(6))
def test_random_byte_changes_give_valid_events_or_an_error(intact_file, tmp_path, seed):
    rng = np.random.default_rng(seed)
    content = np.frombuffer(intact_file[0], np.uint8).copy()
    content[rng.integers(14, len(content), 4)] = rng.integers(0, 256, 4)
    (tmp_path / "a.aedat4").write_bytes(content.tobytes())
    try:
        events = read_events(tmp_path / "a.aedat4")
    except ValueError as error:
        events, message = None, str(error)
    if events is None:
        assert message.startswith(f"{tmp_path}/a.aedat4: ")
    else:
        assert events["t"].min() >= 0
        assert events["x"].max() < 34


def test_closing_a_recording_early_ends_the_decoding_process(tmp_path, monkeypatch):
    """A fake faery takes half a minute for its second packet, so that the process does not end by itself."""
    packet = "if hasattr(self, 'x'): __import__('time').sleep(30); raise StopIteration\n            self.x = 1"
    install_fake_faery(tmp_path, monkeypatch, packet)
    before = children()
    with open_recording(tmp_path / "a.aedat4") as recording:
        next(recording.packed())
        (process,) = children() - before
        closed = time.monotonic()
    while process in children() and time.monotonic() < closed + 10:
        time.sleep(0.01)
    assert process not in children()
    assert time.monotonic() < closed + 10


def test_frames_by_count_hold_equal_numbers_of_events(faery, tmp_path):
    written = write_recording(faery, tmp_path / "a.aedat4")
    options = FrameOptions(size=(20, 34), timesteps=3, slicing="count")
    frames = frames_of_windows(lambda: open_recording(tmp_path / "a.aedat4"), [(None, None)], options)[0]
    assert frames.counts.astype(int).sum(axis=(1, 2, 3)).tolist() == [1000, 1000, 1000]
    assert frames.events == len(written)


TIMES = r"expected 0 to 2\^62; the file is damaged"
FAKE_FAERY = """
    import os, signal, sys, types
    import numpy as np
    class Decoder:
        track = types.SimpleNamespace(data_type="events", dimensions={dimensions})
        def __init__(self, *_): pass
        def tracks(self): return [self.track]
        def __iter__(self): return self
        def __next__(self):
            events = np.zeros(1000, [("t", "<u8"), ("x", "<u2"), ("y", "<u2"), ("on", "u1")])
            {packet}
            return self.track, events
    aedat = types.SimpleNamespace(Decoder=Decoder)
"""


@pytest.mark.parametrize(
    ("packet", "error"),
    [
        ("while True: pass", "takes far longer to decode than a sound file of its size; the file is damaged"),
        ("events = events[:1]; sum(range(1_000_000))", "takes far longer"),
        ("os.abort()", r"ends the process that decodes it \(SIGABRT\), which may take 64 MB; the file is damaged"),
        ("os._exit(3)", r"ends the process that decodes it \(code 3\)"),
        ("bytearray(100_000_000)", "cannot be read: MemoryError; the file is damaged or cut short"),
        ("pass", "holds more than 65,536 events in 14 bytes, more than any camera's; the file is damaged"),
        ("events['t'] = 1 << 63", f"an event has the time -9,223,372,036,854,775,808 µs, {TIMES}"),
        ("events['t'] = 1 << 62", f"an event has the time 4,611,686,018,427,387,904 µs, {TIMES}"),
        ("events['x'][7] = 40", r"event 7 \(the first is 0\) lies at column 40, row 0, expected a sensor of 34 × 20"),
        ("raise KeyError('x' * 70_000)", "cannot be read: 'xxx"),
        (
            "raise RuntimeError('x overflow (x=400 must be smaller than width=346)')",
            r"an event lies beside the sensor \(x=400 must be smaller than width=346\), and the library faery refuses",
        ),
        ("class PanicException(BaseException): pass\n            raise PanicException('oh')", "cannot be read: oh"),
    ],
)
def test_failing_decoder_is_reported_as_one_error(tmp_path, monkeypatch, packet, error):
    """A fake faery does what a damaged file could make any version of the real library do."""
    install_fake_faery(tmp_path, monkeypatch, packet)
    tracemalloc.start()
    started = time.monotonic()
    with pytest.raises(ValueError, match=rf"a\.aedat4: {error}"):
        read_events(tmp_path / "a.aedat4")
    assert time.monotonic() - started < 30  # the decoder's processor time is limited; a busy machine needs longer
    assert tracemalloc.get_traced_memory()[1] < 10_000_000
    tracemalloc.stop()


def install_fake_faery(tmp_path, monkeypatch, packet: str, dimensions=(34, 20)) -> None:
    folder = tmp_path / "library"
    folder.mkdir()
    (folder / "faery.py").write_text(textwrap.dedent(FAKE_FAERY.format(packet=packet, dimensions=dimensions)))
    (tmp_path / "a.aedat4").write_bytes(AEDAT4)
    monkeypatch.setenv("PYTHONPATH", str(folder))
    monkeypatch.syspath_prepend(folder)


def test_impossible_sensor_size_is_refused(tmp_path, monkeypatch):
    install_fake_faery(tmp_path, monkeypatch, "pass", (65535, 20))
    with pytest.raises(ValueError, match="says that its sensor has 65535 × 20 pixels, expected 1 to 4096 a side"):
        read_events(tmp_path / "a.aedat4")


def test_any_nonzero_polarity_is_1(tmp_path, monkeypatch):
    once = "events['on'][3:] = 255\n            if hasattr(self, 'x'): raise StopIteration\n            self.x = 1"
    install_fake_faery(tmp_path, monkeypatch, once)
    assert read_events(tmp_path / "a.aedat4")["p"].tolist() == [0] * 3 + [1] * 997


def test_pipe_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="pipe: AEDAT4 is read from a file of its own only; write it to one first"):
        aedat4.open_aedat4(tmp_path / "pipe")


def test_modules_in_the_current_folder_are_not_imported(faery, tmp_path, monkeypatch):
    write_recording(faery, tmp_path / "a.aedat4")
    (tmp_path / "json.py").write_text("raise SystemExit('run')")
    monkeypatch.chdir(tmp_path)
    assert len(read_events("a.aedat4")) == 3000
