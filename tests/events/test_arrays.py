"""Events in NPY, NPZ and HDF5: layouts, units, polarities, damaged files, and bounded memory."""

import io
import os
import sys
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))
from event_files import NamedBytes, encode_davis, encode_text, sensor_events

from multifire.events import arrays, frames_of_windows, hdf5, open_recording, read_events
from multifire.events.frames import FrameOptions
from multifire.utils import hdf5_texts

EVENTS = sensor_events(346, 260, start_us=51_000_000)


def npy_bytes(array) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def npz_bytes(compressed: bool = False, **named) -> bytes:
    file = io.BytesIO()
    (np.savez_compressed if compressed else np.savez)(file, **named)
    return file.getvalue()


def structured(**types) -> np.ndarray:
    array = np.zeros(len(EVENTS), list(types.items()))
    for name in types:
        array[name] = EVENTS[name[0]]
    return array


def read(content: bytes, **options) -> np.ndarray:
    return read_events(NamedBytes(content), **options)


def signed() -> np.ndarray:
    events = EVENTS.copy()
    events["p"] = 2 * events["p"] - 1
    return events


ROWS = np.stack([EVENTS[name].astype(np.int64) for name in "txyp"], 1)


@pytest.mark.parametrize(
    "array",
    [
        EVENTS,
        signed(),
        structured(x="i2", y="i2", t="i8", p="?"),
        structured(x=">u2", y="<f4", polarity="u1", timestamp="u8"),
        ROWS,
        np.ascontiguousarray(ROWS[:, [1, 2, 0, 3]], float),
    ],
)
def test_npy_holds_a_structured_array_or_rows_of_four(array):
    assert np.array_equal(read(npy_bytes(array)), EVENTS)


@pytest.mark.parametrize("compressed", [False, True])
def test_npz_holds_four_arrays_or_a_structured_one(compressed):
    columns = {name: EVENTS[name] for name in "txyp"}
    for named in (
        columns | {"p": EVENTS["p"].astype(bool)},
        {"xs": EVENTS["x"], "ys": EVENTS["y"], "ts": EVENTS["t"] / 1e6, "ps": signed()["p"]},
        columns | {"label": np.int64(3)},
        {"events": EVENTS},
    ):
        content = npz_bytes(compressed, **named)
        assert np.array_equal(read(content), EVENTS)
        with open_recording(NamedBytes(content)) as recording:
            assert (recording.format, recording.sensor_size) == ("npz", None)


def test_objects_are_never_unpickled():
    class Evil:
        def __reduce__(self):
            return (pytest.fail, ("code from a data file ran",))

    evil = np.array([Evil()], object)
    for content in (npy_bytes(evil), npz_bytes(t=evil, x=evil, y=evil, p=evil)):
        with pytest.raises(ValueError, match="made: holds Python objects, which are not read; save plain numbers"):
            read(content)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (npy_bytes(np.zeros((3, 5))), r"holds an array \[3, 5\] of float64, expected a structured one"),
        (
            npy_bytes(np.zeros((4, 300)).T),
            r"holds an array \[300, 4\] in columns, expected rows; save np.ascontiguousarray",
        ),
        (npy_bytes(np.zeros(3)), "holds 3 elements of float64, expected fields t, x, y and p"),
        (npy_bytes(np.zeros(3, [("t", "i8"), ("x", "i2"), ("y", "i2"), ("p", "S1")])), "its column p holds .S1"),
        (npy_bytes(np.zeros(3, [("t", "i8"), ("x", "i2"), ("y", "i2", 2), ("p", "i1")])), "its field y is"),
        (npy_bytes(np.zeros(0, EVENTS.dtype)), "holds no event"),
        (npy_bytes(np.full(3, -1, EVENTS.dtype)), "event 0 .* has the time -1"),
        (npy_bytes(np.full(3, 3, EVENTS.dtype)), "has the polarity 3, expected 0 and 1, or -1 and 1"),
        (npy_bytes(EVENTS)[:40], "made: .*damaged"),
        (b"\x93NUMPY\x02\x00\xff\xff\xff\xff{", "expected the header of an array; the file is damaged"),
        (npz_bytes(a=EVENTS["t"]), "holds the arrays a, expected arrays t, x, y and p, or a structured one"),
        (npz_bytes(t=EVENTS["t"], x=EVENTS["x"], y=EVENTS["y"], p=EVENTS["p"][1:]), "2,000 of y, 1,999 of p, expected"),
        (npz_bytes(t=EVENTS["t"], x=EVENTS["x"], y=EVENTS["y"], p=EVENTS["p"])[:-50], "made: cannot be read"),
        (
            npz_bytes(True, **{name: np.zeros(1 << 20, bool) for name in "txyp"}),
            "says that it holds 1,048,576 events in .* bytes, expected at most 524,288; the file is damaged",
        ),
    ],
)
def test_other_and_damaged_arrays_are_refused(content, message):
    with pytest.raises(ValueError, match=message):
        read(content)


@pytest.mark.parametrize("kind", ["i2", "u2", "i4", "u4", "i8", "u8", ">i4", "f4", "f8"])
def test_every_type_of_number_holds_coordinates(kind):
    columns = {"t": EVENTS["t"], "p": EVENTS["p"]} | {name: EVENTS[name].astype(kind) for name in "xy"}
    assert np.array_equal(read(npz_bytes(**columns), sensor_size=(260, 346)), EVENTS)
    columns["x"][7] = np.iinfo(kind).max if "f" not in kind else 1e30
    with pytest.raises(ValueError, match="; 1 events of 2,000 lie beside it"):
        read(npz_bytes(**columns), sensor_size=(260, 346))


@pytest.mark.parametrize("kind", ["u4", "i4", "i8", "u8", "f8"])
def test_every_type_of_number_holds_times(kind):
    columns = {name: EVENTS[name] for name in "xyp"} | {"t": EVENTS["t"].astype(kind)}
    assert np.array_equal(read(npz_bytes(**columns)), EVENTS)


def test_npz_with_a_changed_byte_is_refused():
    content = bytearray(npz_bytes(t=EVENTS["t"], x=EVENTS["x"], y=EVENTS["y"], p=EVENTS["p"]))
    content[5000] ^= 64
    with pytest.raises(ValueError, match=r"made: cannot be read: Bad CRC-32|has the time"):
        read(bytes(content))


def test_npy_cut_short_keeps_the_complete_events(caplog):
    assert np.array_equal(read(npy_bytes(EVENTS)[:-14]), EVENTS[:-2])
    assert "cut short before the last 2 of its 2,000 events" in caplog.text


def test_events_beside_the_sensor_are_counted_or_dropped(caplog):
    events = EVENTS.copy()
    events["x"][[10, 500]] = 400
    events["y"][900] = -1
    kept = np.delete(events, [10, 500, 900])
    for content in (npy_bytes(events), npz_bytes(**{name: events[name] for name in "txyp"})):
        with pytest.raises(
            ValueError, match=r"event 10 .* column 400, .* 346 × 260; 3 events of 2,000 .*--data.stray drop"
        ):
            read(content, sensor_size=(260, 346))
        assert np.array_equal(read(content, sensor_size=(260, 346), stray="drop"), kept)
        assert "3 events beside the sensor of 346 × 260 were dropped" in caplog.text


def test_memory_does_not_grow_with_the_recording(tmp_path):
    h5py = pytest.importorskip("h5py", reason="the extra `cameras` is not installed")
    events = sensor_events(346, 260, 1_000_000)
    np.save(tmp_path / "a.npy", events)
    np.savez(tmp_path / "a.npz", **{name: events[name] for name in "txyp"})
    (tmp_path / "a.aedat").write_bytes(encode_davis(events))
    (tmp_path / "a.csv").write_bytes(encode_text(events[:200_000]) * 5)
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["CD/events"] = events
    for path in sorted(tmp_path.iterdir()):
        tracemalloc.start()
        frames_of_windows(
            lambda path=path: open_recording(path, sensor_size=(260, 346)), [(None, None)], FrameOptions()
        )
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 10_000_000, path.name


# HDF5


@pytest.fixture
def h5py():
    return pytest.importorskip("h5py", reason="the extra `cameras` is not installed")


def write_dsec(file, offset=51_000_000_000, **options):
    for key, kind in (("x", "u2"), ("y", "u2"), ("t", "u4"), ("p", "u1")):
        file.create_dataset(f"events/{key}", data=EVENTS[key].astype(kind), **options)
    file["t_offset"] = np.int64(offset)
    file["ms_to_idx"] = np.arange(100)


def write_seconds(file):
    for key, values in (("xs", EVENTS["x"]), ("ys", EVENTS["y"]), ("ts", EVENTS["t"] / 1e6), ("ps", EVENTS["p"] > 0)):
        file[f"events/{key}"] = values
    file.attrs["sensor_resolution"] = (260, 346)


def write_records(file):
    file["CD/events"] = structured(x="u2", y="u2", p="i2", t="i8")
    file.attrs["geometry"] = "346x260"


@pytest.mark.parametrize(
    ("write", "size", "offset"),
    [(write_dsec, None, 51_000_000_000), (write_seconds, (260, 346), 0), (write_records, (260, 346), 0)],
)
def test_hdf5_of_each_layout_is_read(h5py, tmp_path, write, size, offset):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        write(file)
    expected = EVENTS.copy()
    expected["t"] += offset
    with open_recording(tmp_path / "a.h5") as recording:
        assert (recording.format, recording.sensor_size) == ("hdf5", size)
    assert np.array_equal(read_events(tmp_path / "a.h5"), expected)
    assert np.array_equal(read((tmp_path / "a.h5").read_bytes()), expected)


def test_compressed_hdf5_is_read_across_chunks(h5py, tmp_path, monkeypatch):
    monkeypatch.setattr(hdf5, "AT_A_TIME", 300)
    with h5py.File(tmp_path / "a.h5", "w") as file:
        write_dsec(file, 0, compression="gzip", chunks=(700,))
    assert np.array_equal(read_events(tmp_path / "a.h5"), EVENTS)


def test_events_beside_the_sensor_of_hdf5_are_counted(h5py, tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        write_seconds(file)
        file.attrs["sensor_resolution"] = (260, 340)
    wrong = np.count_nonzero(EVENTS["x"] >= 340)
    with pytest.raises(ValueError, match=f"; {wrong} events of 2,000 lie beside it"):
        read_events(tmp_path / "a.h5")
    assert len(read_events(tmp_path / "a.h5", stray="drop")) == len(EVENTS) - wrong


def spoil(kind: str, file, h5py) -> None:
    """Write an HDF5 file that must be refused."""
    if kind == "two cameras":
        write_records(file)
        file["right/events"] = EVENTS
    elif kind == "no events":
        file["images"] = np.zeros((3, 3))
    elif kind == "link":
        file["events"] = h5py.ExternalLink("other.h5", "/events")
    elif kind == "lengths":
        for key in "txyp":
            file[f"events/{key}"] = EVENTS[key][key == "t" :]
    elif kind == "too many":
        for key in "txyp":
            file.create_dataset(f"events/{key}", (1 << 40,), "i8", chunks=(1000,))
    elif kind == "external":
        for key in "txyp":
            file.create_dataset(f"events/{key}", (100,), "i8", external=[("/etc/passwd", 0, 800)])
    elif kind == "chunks":
        for key in "txyp":
            file.create_dataset(f"events/{key}", (100,), "i8", chunks=(1 << 24,), maxshape=(None,))
    elif kind == "texts":
        for key in "txyp":
            file.create_dataset(f"events/{key}", (100,), "S100000")
    elif kind == "records":
        file.create_dataset("events", (5000,), [*((key, "i8") for key in "txyp"), ("pad", "V30000")])
    else:
        write_dsec(file, -5)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("two cameras", "holds the events of 2 cameras: /CD/events, /right/events, expected those of one"),
        ("no events", "holds the events of 0 cameras, expected those of one"),
        ("link", "holds the events of 0 cameras"),
        ("lengths", "differ in length; the file is damaged"),
        ("too many", "says that it holds 1,099,511,627,776 events in .* the file is damaged"),
        ("external", "lies in another file, which is not read"),
        ("chunks", "in chunks of 16,777,216 events, expected at most 16 MB a chunk"),
        ("texts", r"is of type \|S100000, expected numbers"),
        ("records", "lies in records of .*, expected at most 4096 bytes of numbers"),
        ("offset", "its t_offset is -5 µs, expected 0 to"),
    ],
)
def test_other_and_damaged_hdf5_is_refused(h5py, tmp_path, kind, message):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        spoil(kind, file, h5py)
    with pytest.raises(ValueError, match=rf"a\.h5: .*{message}"):
        read_events(tmp_path / "a.h5")


def test_groups_that_contain_each_other_are_searched_once_enough(h5py, tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        for number in range(50):
            file[f"group/{number}"] = file["/"]
    with pytest.raises(ValueError, match="holds the events of 0 cameras"):
        read_events(tmp_path / "a.h5")


def test_compression_that_is_not_installed_is_named(h5py, tmp_path, monkeypatch):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        write_dsec(file, 0, compression="gzip")
    monkeypatch.setattr(h5py.h5z, "filter_avail", lambda code: False)
    monkeypatch.setattr(hdf5, "COMPRESSION", {1: "Blosc"})
    monkeypatch.setitem(sys.modules, "hdf5plugin", None)
    with pytest.raises(
        ValueError, match="is compressed with Blosc, which h5py does not read here; pip install hdf5plugin"
    ):
        read_events(tmp_path / "a.h5")


def test_cut_hdf5_is_refused(h5py, tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        write_dsec(file)
    content = (tmp_path / "a.h5").read_bytes()
    for kept in (9, 100, len(content) // 2):
        with pytest.raises(ValueError, match=r"made: cannot be read: .*; the file is damaged or cut short"):
            read(content[:kept])


def test_hdf5_without_h5py_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "h5py", None)
    (tmp_path / "a.h5").write_bytes(hdf5_texts.MAGIC)
    with pytest.raises(ValueError, match=r"reading HDF5 needs the library h5py; pip install 'multifire\[cameras\]'"):
        read_events(tmp_path / "a.h5")


def test_pipes_are_refused(h5py):
    for content, what in ((npz_bytes(t=EVENTS["t"]), "npz"), (hdf5_texts.MAGIC + bytes(50), "HDF5")):
        reader, writer = os.pipe()
        with os.fdopen(reader, "rb") as file:
            os.write(writer, content[:1000])
            os.close(writer)
            with pytest.raises(
                ValueError, match=f"{what} is read from a file that can seek only; write it to one first"
            ):
                read_events(file)


def test_archive_of_other_files_is_refused():
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("notes.txt", "hello")
    with pytest.raises(ValueError, match="holds no array, expected arrays t, x, y and p"):
        read(file.getvalue())


def test_number_of_events_at_a_time_does_not_change_them(monkeypatch):
    monkeypatch.setattr(arrays, "AT_A_TIME", 7)
    assert np.array_equal(read(npz_bytes(**{name: EVENTS[name] for name in "txyp"})), EVENTS)


@pytest.mark.parametrize("kind", ["npy", "npz", "npz compressed", "dsec", "records", "csv", "davis"])
def test_random_changes_give_events_or_an_error_with_the_name(h5py, kind):
    rng = np.random.default_rng(0)
    columns = {name: EVENTS[name] for name in "txyp"}
    if kind in ("dsec", "records"):
        file = io.BytesIO()
        with h5py.File(file, "w") as opened:
            (write_dsec if kind == "dsec" else write_records)(opened)
        content = file.getvalue()
    else:
        content = {
            "npy": npy_bytes(EVENTS),
            "npz": npz_bytes(**columns),
            "npz compressed": npz_bytes(True, **columns),
            "csv": encode_text(EVENTS, "{x},{y},{p},{t}", "x,y,p,t\n"),
            "davis": encode_davis(EVENTS),
        }[kind]
    for number in range(80):
        changed = bytearray(content)
        for at in rng.integers(0, len(content) if number % 2 else 4000, 3):
            changed[at] = rng.integers(0, 256)
        if number % 4 == 0:
            del changed[rng.integers(0, len(content)) :]
        try:
            assert len(read(bytes(changed)))
        except (ValueError, OSError) as error:
            assert str(error).startswith("made: ")  # noqa: PT017
