"""The reader of pickles: it builds plain data of every protocol, refuses all else, and runs and allocates nothing."""

import os
import pickle
import pickletools
import tracemalloc
import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from multifire.datasets.unpickle import read_pickle

PROTOCOLS = range(pickle.HIGHEST_PROTOCOL + 1)
PLAIN = (type(None), bool, int, float, bytes, str, list, tuple, dict, np.ndarray)

values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False)
    | st.text(st.characters(codec="utf-8"))
    | st.binary(),
    lambda inner: (
        st.lists(inner, max_size=5)
        | st.lists(inner, max_size=5).map(tuple)
        | st.dictionaries(st.text() | st.binary() | st.integers(0, 9), inner, max_size=5)
    ),
    max_leaves=20,
)


def batch(images: int = 3) -> dict[bytes, object]:
    """Return what a batch of CIFAR-10's Python version holds."""
    rng = np.random.default_rng(images)
    return {
        b"batch_label": b"training batch 1 of 5",
        b"labels": rng.integers(0, 10, images).tolist(),
        b"data": rng.integers(0, 256, (images, 20), dtype=np.uint8),
        b"filenames": [f"image_{i}.png".encode() for i in range(images)],
    }


def check_plain(value: object) -> None:
    """Check that a value holds nothing but plain data, without recursion: fuzzed lists may contain themselves."""
    pending, seen = [value], set()
    while pending:
        item = pending.pop()
        assert type(item) in PLAIN
        assert not isinstance(item, np.ndarray) or item.dtype.kind in "buif"
        if isinstance(item, (list, tuple, dict)) and id(item) not in seen:
            seen.add(id(item))
            pending += [*item.keys(), *item.values()] if isinstance(item, dict) else item


@given(values, st.sampled_from(PROTOCOLS))
@settings(deadline=None, max_examples=200)
def test_plain_values_of_every_protocol_are_read(value, protocol):
    found = read_pickle(pickle.dumps(value, protocol), "x")
    assert found == value
    assert repr(found) == repr(value)  # True is not 1


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("dtype", ["u1", "i1", ">u2", "<i4", ">i8", "u8", "f4", ">f8", "?"])
@pytest.mark.parametrize("shape", [(5,), (2, 3), (3, 1, 2), (0,)])
def test_arrays_of_every_protocol_are_read(protocol, dtype, shape):
    array = (np.random.default_rng(0).random(shape) * 100).astype(dtype)
    for given_array in (array, np.asfortranarray(array), np.repeat(array[None], 4, 0)[::2]):
        for again in read_pickle(pickle.dumps([given_array, {"twice": given_array}, given_array], protocol), "x")[::2]:
            assert again.dtype == given_array.dtype
            assert again.shape == given_array.shape
            assert np.array_equal(again, given_array)


def test_an_array_is_the_same_object_wherever_it_is_named():
    array = np.arange(6)
    for protocol in PROTOCOLS:
        first, second = read_pickle(pickle.dumps([array, array], protocol), "x")
        assert first is second


def test_strings_of_python_2_are_bytes():
    assert read_pickle(b"(dp0\nS'labels'\np1\n(lp2\nI6\naI9\nas.", "x") == {b"labels": [6, 9]}
    assert read_pickle(b"S'\\x00\\xff\\n\\'\\\\'\n.", "x") == b"\x00\xff\n'\\"
    assert read_pickle(b"\x80\x02U\x04data.", "x") == b"data"
    start = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntS'b'\ntR"
    dtype = b"cnumpy\ndtype\n(S'u1'\nI0\nI1\ntR"
    array = read_pickle(start + b"(I1\n(I2\nt" + dtype + b"(I3\nS'|'\nNNNI-1\nI-1\nI0\ntbI00\nS'\\x01\\x02'\ntb.", "x")
    assert array.tolist() == [1, 2]


class Evil:
    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    """Run the test in a folder where a file `never` would show that a pickle ran a command."""
    monkeypatch.chdir(tmp_path)


CALLS = [
    (print, ("code from a data file ran",)),
    (os.system, ("touch never",)),
    (eval, ("1",)),
    (getattr, ("x", "upper")),
    (np.frombuffer, (b"1",)),
    (bytes, (1 << 40,)),
    (np.dtype, ("O",)),
    (np.dtype, ("V1000000000000",)),
    (np.empty, ((1 << 40,),)),
    (__import__("_codecs").encode, ("a", "rot13")),
]


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("call", CALLS, ids=lambda call: call[0].__name__)
def test_calls_are_refused_and_nothing_runs(protocol, call, capfd):
    data = pickle.dumps({b"labels": [0], b"data": Evil(*call)}, protocol)
    with pytest.raises(
        ValueError, match=r"^batch: holds .*may run code.*nothing was run: do not use this file"
    ) as error:
        read_pickle(data, "batch")
    assert "\n" not in str(error.value)
    assert capfd.readouterr() == ("", "")
    assert not Path("never").exists()


@pytest.mark.parametrize(
    "data",
    [
        b"(i__builtin__\nprint\n.",
        b"\x80\x02(c__builtin__\nprint\no.",
        b"Pid\n.",
        b"\x80\x01K\x01Q.",
        b"\x80\x02\x82\x01.",
        b"\x80\x02cnumpy\nndarray\n)\x81.",
        b"\x80\x02cnumpy\nndarray\n}b.",
        b"cnumpy\nndarray\n.",
        b"\x80\x04\x8f.",
        b"\x80\x05\x97.",
        b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntS'b'\ntR.",  # an array that is never filled
        b"cnumpy.core.multiarray\nscalar\n.",
        b"\x80\x04\x8c\x05numpy\x8c\x13core.multiarray._re\x93.",
        b"]c_codecs\nencode\na.",
    ],
)
def test_other_opcodes_and_unfinished_arrays_are_refused(data):
    with pytest.raises(ValueError, match="may run code"):
        read_pickle(data, "x")


def test_an_array_of_objects_is_refused():
    for protocol in PROTOCOLS:
        with pytest.raises(ValueError, match="may run code"):
            read_pickle(pickle.dumps(np.array([None, {}]), protocol), "x")


@pytest.mark.parametrize(
    "data",
    [
        b"", b".", b"(.", b"K", b"I\n.", b"I1", b"N", b"NN.", b"\x80\x06N.", b"0.", b"]Na", b"h\x00.", b"s.", b"}NNs.",
        b"X\xff\xff\xff\x7fa.", b"\x8e\xff\xff\xff\xff\xff\xff\xff\xffa.", b"T\xff\xff\xff\xffa.", b"S'\\q'\n.",
        b"SA\n.",
        b"Vx\\uZZZZ\n.", b"I" + b"9" * 5000 + b"\n.", b"\x8a\xff" + b"\1" * 255 + b".", b"F" + b"1" * 500 + b"\n.",
        b"}(K\x01u.", b"((K\x01d.", b"(K\x01t", b"\x95\xff\xff\xff\xff\xff\xff\xff\x7fN.", b"p-1\n", b"Np-1\n.", b"e.",
    ],
)  # fmt: skip
def test_damage_is_a_value_error_of_one_line(data):
    with pytest.raises(ValueError, match=r"^x: (damaged|holds)") as error:
        read_pickle(data, "x")
    assert "\n" not in str(error.value)


def test_a_small_pickle_allocates_little():
    text = b"X\x00\xc0\x00\x00" + b"a" * 0xC000
    encode_often = (
        b"c_codecs\nencode\n\x94" + text + b"\x94X\x06\x00\x00\x00latin1\x94]" + b"(h\x00h\x01h\x02\x86Re" * 5000
    )
    cases = [
        b"]" * 60_000,
        b"}" * 60_000,
        b"K\x01" + b"\x85" * 60_000,
        b"N" + b"\x94" * 60_000,
        b"(" * 60_000,
        encode_often,
        b"]" + b"2a" * 30_000,
        b"K\x01\x85" + b"2\x86" * 100,  # 2^100 values, if one counted them
        b"K\x01\x85" + b"2\x86" * 100 + b"K\x01}" + b"2\x86s",
    ]
    header = (
        b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntS'b'\ntR(I1\n(I%d\ntcnumpy\ndtype\n(S'u1'\n"
    )
    cases.append(header % (1 << 40) + b"I0\nI1\ntR(I3\nS'|'\nNNNI-1\nI-1\nI0\ntbI00\nS'\\x01'\ntb.")
    for data in cases:
        tracemalloc.start()
        for ending in (b".", b""):
            with pytest.raises(ValueError, match=r"^x: "):
                read_pickle(data + ending + b"N", "x") if not ending else read_pickle(b"(" + data + ending, "x")
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 200 * len(data) + 200_000


def test_nested_tuples_are_read_in_time():
    value = read_pickle(b"K\x01\x85" + b"2\x86" * 100 + b".", "x")
    check_plain(value)


def seeds() -> list[bytes]:
    """Return pickles to mutate: batches, arrays and calls, of every protocol."""
    contents = [
        batch(),
        [np.arange(4.0), np.asfortranarray(np.ones((2, 3), ">u2"))],
        {"a": [1, (2.5, None)], b"b": "ä"},
    ]
    contents += [{b"data": Evil(*call)} for call in CALLS[:4]]
    return [pickle.dumps(content, protocol) for content in contents for protocol in PROTOCOLS]


def mutated(rng: np.random.Generator, originals: list[bytes], codes: bytes) -> bytes:
    data = bytearray(originals[rng.integers(len(originals))])
    for _ in range(rng.integers(1, 6)):
        place = int(rng.integers(len(data) + 1))
        kind = rng.integers(6)
        if kind == 0 and place < len(data):
            data[place] = rng.integers(256)
        elif kind == 1 and place < len(data):
            data[place] = codes[rng.integers(len(codes))]
        elif kind == 2:
            data[place:place] = bytes([codes[rng.integers(len(codes))]])
        elif kind == 3:
            del data[place : place + int(rng.integers(1, 9))]
        elif kind == 4:
            other = originals[rng.integers(len(originals))]
            start = int(rng.integers(len(other)))
            data[place:place] = other[start : start + int(rng.integers(1, 60))]
        else:
            data = data[:place] + b"." if rng.random() < 0.3 else data
    return bytes(data)


def read_or_refuse(data: bytes) -> object:
    try:
        return read_pickle(data, "x")
    except ValueError as error:
        return error


@pytest.mark.parametrize("count", [3_000, pytest.param(100_000, marks=pytest.mark.slow)])
def test_mutated_pickles_raise_only_value_errors_and_build_only_plain_data(count, capfd):
    rng = np.random.default_rng(count)
    originals, codes = seeds(), "".join(op.code for op in pickletools.opcodes).encode("latin1")
    built = 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(count):
            value = read_or_refuse(mutated(rng, originals, codes))
            if isinstance(value, ValueError):
                assert str(value).startswith("x: ")
                assert "\n" not in str(value)
            else:
                check_plain(value)
                built += 1
    assert built > count // 100
    assert capfd.readouterr() == ("", "")
    assert not Path("never").exists()
