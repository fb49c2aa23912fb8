"""The check of HDF5's heaps of texts: it passes what h5py writes, and refuses what HDF5 reads without end."""

import io
import subprocess
import sys

import numpy as np
import pytest

from multifire.events import EVENT_DTYPE
from multifire.utils import hdf5_heaps
from multifire.utils.hdf5_heaps import check_heaps

h5py = pytest.importorskip("h5py")


def file_with(texts: list[str], **options) -> bytes:
    content = io.BytesIO()
    with h5py.File(content, "w", **options) as file:
        file["texts"] = texts
    return content.getvalue()


def check(content: bytes) -> None:
    check_heaps(io.BytesIO(content), "a.h5")


def change(content: bytes, at: int, value: int, size: int = 8) -> bytes:
    """Replace a number `at` bytes behind the start of the first heap."""
    at += content.index(b"GCOL")
    return content[:at] + value.to_bytes(size, "little") + content[at + size :]


@pytest.mark.parametrize("texts", [["a"], ["x" * n for n in range(300)], ["y" * 50_000, "z"] * 3])
@pytest.mark.parametrize("options", [{}, {"libver": "latest"}, {"userblock_size": 2048}])
@pytest.mark.parametrize("piece", [7, 1000, 1 << 22])
def test_what_h5py_writes_passes(monkeypatch, texts, options, piece):
    monkeypatch.setattr(hdf5_heaps, "PIECE", piece)
    content = file_with(texts, **options)
    assert b"GCOL" in content
    check(content)


SIZE, FIRST, FIRST_SIZE, FREE, FREE_SIZE = 8, 16, 24, 40, 48
"""Offsets in a heap with one text of at most 8 bytes."""


@pytest.mark.parametrize(
    ("at", "value"),
    [
        (SIZE, 0), (SIZE, 8), (SIZE, 1 << 40), (SIZE, (1 << 64) - 16), (SIZE, 4096 + 16), (FIRST_SIZE, 1 << 62),
        (FIRST_SIZE, (1 << 64) - 1), (FREE_SIZE, 0), (FREE_SIZE, 8), (FREE_SIZE, 1 << 63), (FREE_SIZE, (1 << 64) - 48),
    ],
)  # fmt: skip
def test_damaged_heaps_are_refused(at, value):
    with pytest.raises(ValueError, match=r"a\.h5: damaged: the heap of texts at byte [\d,]+ does not add up"):
        check(change(file_with(["34x34"]), at, value))


def test_cut_heaps_are_refused():
    content = file_with(["34x34"])
    start = content.index(b"GCOL")
    for end in (start + 5, start + 15, start + 16, start + 20, start + 4095):
        with pytest.raises(ValueError, match="does not add up"):
            check(content[:end])


def test_heaps_in_a_heap_are_refused():
    """Else a file of such heaps would take time that grows with the square of its size."""
    with pytest.raises(ValueError, match="does not add up"):
        check(file_with(["GCOL\1", "b"]))


@pytest.mark.parametrize("content", [b"", b"GCOL\1", b"\x89HDF\r\n\x1a\n", b"x" * 5000])
def test_files_without_a_superblock_are_refused(content):
    with pytest.raises(ValueError, match="no HDF5 file whose lengths have 8 bytes"):
        check(content)


def test_lengths_of_4_bytes_are_refused():
    properties = h5py.h5p.create(h5py.h5p.FILE_CREATE)
    properties.set_sizes(8, 4)
    access = h5py.h5p.create(h5py.h5p.FILE_ACCESS)
    access.set_fapl_core(backing_store=False)
    file = h5py.h5f.create(b"a.h5", h5py.h5f.ACC_TRUNC, properties, access)
    h5py.File(file)["texts"] = ["a"]
    h5py.h5f.flush(file)
    with pytest.raises(ValueError, match="no HDF5 file whose lengths have 8 bytes"):
        check(file.get_file_image())


def test_a_recording_with_a_damaged_heap_is_refused_at_once(tmp_path):
    content = io.BytesIO()
    with h5py.File(content, "w") as file:
        file["CD/events"] = np.zeros(20, EVENT_DTYPE)
        file["CD/events"].attrs["geometry"] = "34x34"
    damaged = change(change(content.getvalue(), FREE, 0, 2), FREE_SIZE, 0)
    assert "the heap of texts" in refusal(damaged, tmp_path / "a.h5", "data", "info")


def test_a_graph_with_a_damaged_heap_is_refused_at_once(tmp_path):
    damaged = change(file_with(["34x34"]), FREE_SIZE, 0)
    assert "the heap of texts" in refusal(damaged, tmp_path / "a.nir", "inspect")


def refusal(content: bytes, path, *command: str) -> str:
    """Return what a command of another process, which does not end in HDF5's loop, says of a file."""
    path.write_bytes(content)
    ended = subprocess.run(
        [sys.executable, "-m", "multifire", *command, str(path)], capture_output=True, text=True, timeout=100
    )
    assert ended.returncode == 2
    return ended.stderr
