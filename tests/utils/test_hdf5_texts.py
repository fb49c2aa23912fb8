"""Texts of HDF5 files: what h5py writes is read, and what HDF5 reads without end or with 4 GB is refused."""

import io
import subprocess
import sys

import numpy as np
import pytest

from multifire.events import EVENT_DTYPE, open_recording
from multifire.utils.hdf5_texts import HEAP, OBJECT, REFERENCE, Texts

h5py = pytest.importorskip("h5py")

OPTIONS = [{}, {"libver": "latest"}, {"userblock_size": 2048}]


def written(texts: list[str], **options) -> tuple[bytes, int]:
    """Return a file with an array of texts, and where the array lies."""
    content = io.BytesIO()
    with h5py.File(content, "w", **options) as file:
        file["texts"] = texts
        place = file["texts"].id.get_offset()
    return content.getvalue(), place


def read(content: bytes, place: int, count: int) -> list[bytes]:
    return list(Texts(io.BytesIO(content), "a.h5").at(place, count))


@pytest.mark.parametrize("texts", [["a"], [""], ["é", ""], ["x" * n for n in range(300)], ["y" * 50_000, "z"] * 3])
@pytest.mark.parametrize("options", OPTIONS)
def test_what_h5py_writes_is_read(texts, options):
    content, place = written(texts, **options)
    assert read(content, place, len(texts)) == [text.encode() for text in texts]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("others", [0, 3, 7])
def test_attributes_are_read(options, others):
    content = io.BytesIO()
    with h5py.File(content, "w", **options) as file:
        for node in (file, file.create_dataset("x", data=[1, 2]), file.create_group("g", track_order=True)):
            for number in range(others):
                node.attrs[f"other {number}"] = "q" * number
            node.attrs["geometry"] = "34x34"
    with h5py.File(content) as file:
        texts = Texts(content, "a.h5")
        for node in (file, file["x"], file["g"]):
            address = h5py.h5o.get_info(node.id).addr
            assert texts.attribute(address, "geometry") == b"34x34"
            assert texts.attribute(address, "geometr") is None
            assert [texts.attribute(address, f"other {number}") for number in range(others)] == [
                b"q" * number for number in range(others)
            ]


def test_an_attribute_outside_of_the_header_is_not_found():
    content = io.BytesIO()
    with h5py.File(content, "w", libver="latest") as file:
        for number in range(20):
            file.attrs[f"a{number}"] = "b"
    with h5py.File(content) as file:
        assert Texts(content, "a.h5").attribute(h5py.h5o.get_info(file.id).addr, "a3") is None


def changed(content: bytes, at: int, value: int, size: int = 8) -> bytes:
    """Return the file with another number `at` bytes behind the start of its heap."""
    at += content.index(b"GCOL")
    return content[:at] + value.to_bytes(size, "little") + content[at + size :]


SIZE, FIRST, FIRST_SIZE, FREE, FREE_SIZE = 8, 16, 24, 40, 48
"""Offsets in a heap with one text of at most 8 bytes."""
DAMAGED = r"a\.h5: damaged: a text in it does not lie where the file says"


@pytest.mark.parametrize(
    ("at", "value"),
    [
        (0, 0), (SIZE, 0), (SIZE, 8), (SIZE, 1 << 40), (SIZE, (1 << 64) - 16), (SIZE, 4096 + 16), (FIRST, 2),
        (FIRST_SIZE, 1 << 62), (FIRST_SIZE, (1 << 64) - 1), (FIRST_SIZE, 4), (FIRST_SIZE, 6), (FREE_SIZE, 0),
        (FREE_SIZE, 8), (FREE_SIZE, 1 << 63), (FREE_SIZE, (1 << 64) - 48),
    ],
)  # fmt: skip
def test_damaged_heaps_are_refused(at, value):
    content, place = written(["34x34"])
    with pytest.raises(ValueError, match=DAMAGED):
        read(changed(content, at, value), place, 1)


@pytest.mark.parametrize(("at", "value", "size"), [(0, 1 << 31, 4), (0, 4, 4), (4, 0, 8), (4, 1 << 40, 8), (12, 2, 4)])
def test_references_to_nothing_are_refused(at, value, size):
    content, place = written(["34x34"])
    content = content[: place + at] + value.to_bytes(size, "little") + content[place + at + size :]
    with pytest.raises(ValueError, match=DAMAGED):
        read(content, place, 1)


def test_cut_files_are_refused():
    content, place = written(["34x34"])
    start = content.index(b"GCOL")
    for end in (place + 5, start + 5, start + 15, start + 16, start + 20, start + 4095):
        with pytest.raises(ValueError, match=DAMAGED):
            read(content[:end], place, 1)


def test_heaps_in_a_heap_are_refused():
    """Else a file of such heaps would take time that grows with the square of its size."""
    content, _ = written(["34x34"])
    heaps = [(len(content) + 32 * number, 32 * (60 - number)) for number in range(60)]  # each ends with the last
    objects = [OBJECT.pack(number + 1, 16 if number < 59 else 0) for number in range(60)]
    content += b"".join(HEAP.pack(b"GCOL", 1, size) + each for (_, size), each in zip(heaps, objects, strict=True))
    place = len(content)
    content += b"".join(REFERENCE.pack(16, address, 1 + number) for number, (address, _) in enumerate(heaps[:-1]))
    assert read(content, place, 1) == [content[heaps[1][0] :][:16]]
    with pytest.raises(ValueError, match=DAMAGED):
        read(content, place, 59)


@pytest.mark.parametrize("content", [b"", b"GCOL\1", b"\x89HDF\r\n\x1a\n", b"x" * 5000])
def test_files_without_a_superblock_are_refused(content):
    with pytest.raises(ValueError, match="damaged, or no HDF5 file"):
        Texts(io.BytesIO(content), "a.h5")


def test_lengths_of_4_bytes_are_refused():
    properties = h5py.h5p.create(h5py.h5p.FILE_CREATE)
    properties.set_sizes(8, 4)
    access = h5py.h5p.create(h5py.h5p.FILE_ACCESS)
    access.set_fapl_core(backing_store=False)
    file = h5py.h5f.create(b"a.h5", h5py.h5f.ACC_TRUNC, properties, access)
    h5py.h5f.flush(file)
    with pytest.raises(ValueError, match="whose lengths do not have 8 bytes"):
        Texts(io.BytesIO(file.get_file_image()), "a.h5")


def test_headers_that_continue_without_end_are_refused():
    content = io.BytesIO()
    with h5py.File(content, "w") as file:
        file.attrs["a"] = "b"
        address = h5py.h5o.get_info(file.id).addr
    head = (16).to_bytes(2, "little") + (16).to_bytes(2, "little") + bytes(4)  # continues in itself
    block = head + (address + 16).to_bytes(8, "little") + (24).to_bytes(8, "little")
    data = content.getvalue()
    data = data[: address + 16] + block + data[address + 40 :]
    with pytest.raises(ValueError, match=DAMAGED):
        Texts(io.BytesIO(data), "a.h5").attribute(address, "b")


@pytest.mark.parametrize("options", OPTIONS)
def test_a_recording_says_its_size_in_a_text(tmp_path, options):
    with h5py.File(tmp_path / "a.h5", "w", **({} if "userblock_size" in options else options)) as file:
        file["CD/events"] = np.zeros(20, EVENT_DTYPE)
        file["CD/events"].attrs["geometry"] = "346x260"
    with open_recording(tmp_path / "a.h5") as recording:
        assert recording.sensor_size == (260, 346)


@pytest.mark.parametrize(("at", "value", "size"), [(FREE, 0, 10), (FIRST_SIZE, 1 << 31, 8)])
def test_a_recording_with_a_damaged_text_is_refused_at_once(tmp_path, at, value, size):
    content = io.BytesIO()
    with h5py.File(content, "w") as file:
        file["CD/events"] = np.zeros(20, EVENT_DTYPE)
        file["CD/events"].attrs["geometry"] = "34x34"
    damaged = changed(changed(content.getvalue(), FREE_SIZE, 0), at, value, size)
    assert "a text in it does not lie" in refusal(damaged, tmp_path / "a.h5", "data", "info")


def test_a_graph_with_a_damaged_text_is_refused_at_once(tmp_path):
    content = io.BytesIO()
    with h5py.File(content, "w") as file:
        file["node/type"] = "NIRGraph"
    damaged = changed(content.getvalue(), FREE_SIZE, 0)
    assert "a text in it does not lie" in refusal(damaged, tmp_path / "a.nir", "inspect")


def refusal(content: bytes, path, *command: str) -> str:
    """Return what a command of another process, which does not end in HDF5's loop, says of a file."""
    path.write_bytes(content)
    ended = subprocess.run(
        [sys.executable, "-m", "multifire", *command, str(path)], capture_output=True, text=True, timeout=100
    )
    assert ended.returncode == 2
    return ended.stderr
