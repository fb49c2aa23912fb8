"""Files written by the owners' own libraries read back equal: dv-processing, faery, h5py, expelliarmus."""

from pathlib import Path

import numpy as np
import pytest

from multifire.events import open_recording, read_events
from multifire.events.convert import convert
from tests.events.event_files import sensor_events

pytestmark = pytest.mark.slow
WIDTH, HEIGHT = 346, 260


@pytest.fixture
def events() -> np.ndarray:
    made = sensor_events(WIDTH, HEIGHT, 20_000, seed=11)
    made["t"][0] = 0  # faery counts from the first event
    return made


def assert_equal(found: np.ndarray, expected: np.ndarray) -> None:
    for name in "txyp":
        assert np.array_equal(found[name], expected[name]), name


def test_aedat4_of_dv_processing(tmp_path, events):
    dv = pytest.importorskip("dv_processing", reason="dv-processing is not installed")
    pytest.importorskip("faery", reason="the extra `cameras` is not installed")
    writer = dv.io.MonoCameraWriter(
        str(tmp_path / "a.aedat4"), dv.io.MonoCameraWriter.EventOnlyConfig("DAVIS346", (WIDTH, HEIGHT))
    )
    store = dv.EventStore()
    for t, x, y, p in events.tolist():
        store.push_back(t, x, y, bool(p))
    writer.writeEvents(store)
    del writer
    assert_equal(read_events(tmp_path / "a.aedat4"), events)
    with open_recording(tmp_path / "a.aedat4") as recording:
        assert recording.sensor_size == (HEIGHT, WIDTH)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("a.aedat4", {}),
        ("a.raw", {"version": "evt2"}),
        ("a.raw", {"version": "evt3"}),
        ("a.dat", {"version": "dat2"}),
        ("a.csv", {}),
    ],
)
def test_files_of_faery(tmp_path, events, name, options):
    faery = pytest.importorskip("faery", reason="the extra `cameras` is not installed")
    written = np.zeros(len(events), faery.EVENTS_DTYPE)
    for ours, theirs in (("t", "t"), ("x", "x"), ("y", "y"), ("p", "on")):
        written[theirs] = events[ours]
    faery.events_stream_from_array(written, dimensions=(WIDTH, HEIGHT)).to_file(tmp_path / name, **options)
    assert_equal(read_events(tmp_path / name), events)


@pytest.mark.parametrize("encoding", ["dat", "evt2"])  # its EVT3 has no time high but the first, and loses the times
def test_files_of_expelliarmus(tmp_path, events, encoding):
    wizards = pytest.importorskip("expelliarmus", reason="expelliarmus is not installed")
    written = np.zeros(len(events), [("t", "<i8"), ("x", "<i2"), ("y", "<i2"), ("p", "u1")])
    for name in "txyp":
        written[name] = events[name]
    path = tmp_path / ("a.dat" if encoding == "dat" else "a.raw")
    wizards.Wizard(encoding=encoding).save(path, written)
    assert_equal(read_events(path), events)


def test_files_of_h5py(tmp_path, events):
    h5py = pytest.importorskip("h5py", reason="the extra `cameras` is not installed")
    for options in ({}, {"compression": "gzip"}, {"compression": "lzf", "shuffle": True}):
        path = tmp_path / f"{len(options)}.h5"
        with h5py.File(path, "w") as file:
            for name, kind in (("x", "u2"), ("y", "u2"), ("t", "u4"), ("p", "u1")):
                file.create_dataset(f"events/{name}", data=events[name].astype(kind), chunks=(1000,), **options)
        assert_equal(read_events(path), events)


@pytest.mark.parametrize("format", ["npz", "hdf5", "csv"])
def test_their_readers_find_our_events(tmp_path, events, format):
    """What `multifire data convert` writes is read by NumPy, h5py and faery without multifire."""
    np.save(tmp_path / "a.npy", events)
    out = tmp_path / f"b.{format}"
    convert(lambda: open_recording(tmp_path / "a.npy", sensor_size=(HEIGHT, WIDTH)), out, format)
    assert_equal(read_with_theirs(out, format), events)


def read_with_theirs(path: Path, format: str) -> np.ndarray:
    found = {}
    if format == "npz":
        with np.load(path) as arrays:
            found = {name: arrays[name] for name in "txyp"}
    elif format == "hdf5":
        h5py = pytest.importorskip("h5py", reason="the extra `cameras` is not installed")
        with h5py.File(path) as file:
            found = {name: file[f"events/{name}"][:] for name in "txyp"}
    else:
        table = np.loadtxt(path, delimiter=",", skiprows=1, dtype=np.int64)
        found = {name: table[:, column] for column, name in enumerate("txyp")}
    events = np.zeros(len(found["t"]), [("t", "i8"), ("x", "i2"), ("y", "i2"), ("p", "i1")])
    for name in "txyp":
        events[name] = found[name]
    return events


def test_two_readers_of_evt3_agree_on_vectors(tmp_path, events):
    faery = pytest.importorskip("faery", reason="the extra `cameras` is not installed")
    row = np.zeros(4000, faery.EVENTS_DTYPE)  # neighbours at one time become vectors in EVT3
    row["t"], row["x"], row["y"] = np.arange(4000) // 40, np.arange(4000) % 40, (np.arange(4000) // 40) % HEIGHT
    faery.events_stream_from_array(row, dimensions=(WIDTH, HEIGHT)).to_file(tmp_path / "a.raw", version="evt3")
    theirs = np.concatenate([packet["events"] for packet in faery.evt.Decoder(tmp_path / "a.raw", None, None)])
    ours = read_events(tmp_path / "a.raw")
    for name, other in (("t", "t"), ("x", "x"), ("y", "y"), ("p", "on")):
        assert np.array_equal(ours[name], theirs[other].astype(int)), name
