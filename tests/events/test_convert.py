"""Conversion between formats gives the same events back."""

import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from multifire.cli import main
from multifire.events import EVENT_DTYPE, open_recording, read_events
from multifire.events.convert import convert, format_of
from multifire.events.writers import FORMATS
from tests.events.event_files import encode_davis, random_events, sensor_events

SIZES = [(128, 128), (260, 346), (180, 240), (240, 304), (20, 34), (512, 1024), (1, 1)]
NAMES = {"aedat2": "a.aedat", "aedat3.1": "b.aedat", "npz": "c.npz", "hdf5": "d.h5", "csv": "e.csv"}


@pytest.fixture(autouse=True)
def _h5py():
    pytest.importorskip("h5py", reason="the extra `cameras` is not installed")


def opener(path, size=None):
    return lambda: open_recording(path, sensor_size=size)


@st.composite
def recordings(draw) -> tuple[np.ndarray, tuple[int, int]]:
    """Return events in any order of time, with steps of up to half an hour, and a sensor's (H, W)."""
    size = draw(st.sampled_from(SIZES))
    count = draw(st.integers(1, 60))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    events = np.zeros(count, EVENT_DTYPE)
    step = draw(st.sampled_from([1, 1000, 10**6, 1_800_000_000]))
    events["t"] = draw(st.sampled_from([0, 5, 2**31 - 3, 2**32 - 9, 51_000_000_000])) + np.cumsum(
        rng.integers(0, step + 1, count)
    )
    if draw(st.booleans()) and step < 10**7:
        events["t"] = rng.permutation(events["t"])
    events["x"], events["y"] = rng.integers(0, size[1], count), rng.integers(0, size[0], count)
    events["p"] = rng.integers(0, 2, count)
    return events, size


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(recordings(), st.permutations(list(NAMES)), st.sampled_from([1 << 18, 64]))
def test_the_same_events_come_back_through_every_format(tmp_path, monkeypatch, made, order, chunk_bytes):
    """From NPY through all formats in any order, each read as the one before it; sizes are kept, but by CSV."""
    monkeypatch.setattr("multifire.events.recording.CHUNK_BYTES", chunk_bytes)
    events, size = made
    source = tmp_path / "source.npy"
    np.save(source, events)
    expected = events[np.argsort(events["t"], kind="stable")]
    for format in order:
        out = tmp_path / NAMES[format]
        done = convert(opener(source, size), out, format)
        assert (done.events, done.sensor_size, done.written) == (len(events), size, format)
        found = read_events(out, size if format == "csv" else None)
        assert np.array_equal(found, expected), format
        with open_recording(out) as recording:
            assert recording.sensor_size == (None if format == "csv" else size)
        source = out


def test_formats_are_those_that_the_docs_name():
    assert list(FORMATS) == list(NAMES)
    assert [format_of(path, None) for path in map(Path, ("a.npz", "A.H5", "x.hdf5", "a.csv"))] == [
        "npz", "hdf5", "hdf5", "csv",
    ]  # fmt: skip


def test_turned_recordings(tmp_path):
    events = sensor_events(34, 20, 300)
    np.save(tmp_path / "a.npy", events)
    convert(opener(tmp_path / "a.npy", (20, 34)), tmp_path / "b.npz", flip_x=True, flip_y=True)
    turned = read_events(tmp_path / "b.npz")
    assert np.array_equal(turned["x"], 33 - events["x"])
    assert np.array_equal(turned["y"], 19 - events["y"])
    with pytest.raises(ValueError, match="does not state its sensor's size, which turning it needs"):
        convert(opener(tmp_path / "a.npy"), tmp_path / "c.npz", flip_x=True)


def test_hot_pixels_are_left_out(tmp_path):
    hot = sensor_events(1, 1, 300)
    np.save(tmp_path / "a.npy", hot)
    np.save(tmp_path / "b.npy", np.concatenate([hot, sensor_events(34, 20, 400, seed=3, start_us=3_000_000)]))
    convert(opener(tmp_path / "b.npy", (20, 34)), tmp_path / "c.npz", drop_hot_pixels=True)
    assert 390 <= len(read_events(tmp_path / "c.npz")) <= 400
    with pytest.raises(ValueError, match="holds no event"):
        convert(opener(tmp_path / "a.npy", (20, 34)), tmp_path / "d.npz", drop_hot_pixels=True)


@pytest.mark.parametrize("format", NAMES)
def test_a_damaged_recording_leaves_the_earlier_file_and_nothing_else(tmp_path, format):
    out = tmp_path / "out" / NAMES[format]
    out.parent.mkdir()
    out.write_bytes(b"before")
    (tmp_path / "a.csv").write_text("t,x,y,p\n" + "1,1,1,1\n" * 30_000 + "oops,1,1,1\n")
    with pytest.raises(ValueError, match=r"a\.csv"):
        convert(opener(tmp_path / "a.csv", (20, 34)), out, format)
    assert [path.read_bytes() for path in out.parent.iterdir()] == [b"before"]


@pytest.mark.parametrize("format", NAMES)
def test_memory_does_not_grow_with_the_recording(tmp_path, format):
    (tmp_path / "a.aedat").write_bytes(encode_davis(sensor_events(346, 260, 600_000), "DAVIS346"))
    convert(opener(tmp_path / "a.aedat"), tmp_path / "warm", format)
    tracemalloc.start()
    convert(opener(tmp_path / "a.aedat"), tmp_path / "out", format)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 24_000_000  # the events as Chunk take 15 MB, as text 40 MB
    assert len(read_events(tmp_path / "out", (260, 346))) == 600_000


def test_what_a_format_cannot_hold_is_refused(tmp_path):
    events = random_events(3, 1)
    events["t"] = [0, 5, 5 + (1 << 32)]
    np.save(tmp_path / "a.npy", events)
    with pytest.raises(
        ValueError, match="more than 35 minutes lie between two events up to 4,294,967,301 µs; write AEDAT"
    ):
        convert(opener(tmp_path / "a.npy", (20, 34)), tmp_path / "a.aedat", "aedat2")
    with pytest.raises(ValueError, match="of up to 1024×512 pixels, this one has 1280×720; write AEDAT"):
        convert(opener(tmp_path / "a.npy", (720, 1280)), tmp_path / "a.aedat", "aedat2")
    with pytest.raises(ValueError, match="needs the sensor's size, which the recording does not state"):
        convert(opener(tmp_path / "a.npy"), tmp_path / "a.aedat", "aedat2")
    events["t"] = 1 << 60
    np.save(tmp_path / "a.npy", events)
    with pytest.raises(ValueError, match="holds times of up to"):
        convert(opener(tmp_path / "a.npy"), tmp_path / "a.aedat", "aedat3.1")
    assert [path.name for path in tmp_path.iterdir()] == ["a.npy"]


def test_command(tmp_path, capsys):
    events = sensor_events(346, 260, 500)
    events["x"][7] = 400
    np.save(tmp_path / "a.npy", events)
    given = [str(tmp_path / "a.npy"), str(tmp_path / "b.aedat"), "--sensor", "346x260"]
    assert main(["data", "convert", *given]) == 2
    assert "ends in '.aedat', AEDAT 2.0 or 3.1; give --to aedat2" in capsys.readouterr().err
    assert main(["data", "convert", *given, "--to", "aedat2"]) == 2
    assert "1 events of 500 lie beside it" in capsys.readouterr().err
    assert main(["data", "convert", *given, "--to", "aedat2", "--stray", "drop"]) == 0
    assert "499 events of a sensor of 346×260, npy to aedat2; written to" in capsys.readouterr().out.replace("\n", " ")
    assert main(["data", "convert", str(tmp_path / "b.aedat"), str(tmp_path / "c.csv"), "--flip-y"]) == 0
    assert "CSV does not state the sensor's size" in capsys.readouterr().out.replace("\n", " ")
    found = read_events(tmp_path / "c.csv")
    assert np.array_equal(found["y"], 259 - np.delete(events, 7)["y"])
    assert main(["data", "convert", str(tmp_path / "c.csv"), str(tmp_path / "c.csv")]) == 2
    assert "is the recording itself" in capsys.readouterr().err
    assert main(["data", "convert", str(tmp_path / "none"), str(tmp_path / "d.csv")]) == 2
    assert main(["data", "convert", str(tmp_path / "c.csv"), str(tmp_path / "no" / "d.csv")]) == 2
    assert "no such folder; make it" in capsys.readouterr().err
