"""The native engine reads a file as if a stranger had written it."""

import json
import random
import struct

import numpy as np
import pytest
import torch

from multifire.config import ModelConfig
from multifire.engine import native
from multifire.utils.tensor_files import read_tensors, write_tensors
from tests.engine.networks import random_network, save

pytestmark = pytest.mark.skipif(not native.is_built(), reason="the engine is not built")

MODEL = ModelConfig(name="ds_resnet8", in_channels=2, width=8, num_classes=3, norm_input=True)


@pytest.fixture
def saved(tmp_path):
    return save(tmp_path / "a.safetensors", random_network(MODEL, True), frame_size=8)


def test_damaged_files_are_refused(saved):
    content, rng = saved.read_bytes(), random.Random(0)
    for _ in range(300):
        altered, position = bytearray(content), rng.randrange(len(content))
        altered[position] ^= 1 << rng.randrange(8)
        saved.write_bytes(altered)
        with pytest.raises(ValueError, match=r"a\.safetensors: "):
            native.load(saved)
    for length in (0, 1, 7, 8, 9, 100, len(content) // 2, len(content) - 1):
        saved.write_bytes(content[:length])
        with pytest.raises(ValueError, match=r"a\.safetensors: "):
            native.load(saved)
    saved.write_bytes(content + b"\0")
    with pytest.raises(ValueError, match="do not fill it"):
        native.load(saved)
    saved.write_bytes(content)
    assert native.load(saved).step(np.zeros((2, 8, 8))).shape == (3,)


def test_a_missing_file_is_refused(tmp_path):
    for path in (tmp_path / "none.safetensors", tmp_path):
        with pytest.raises(FileNotFoundError, match="cannot be read"):
            native.load(path)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ("[]", "does not describe its tensors"),
        ("{", "ends early"),
        ("{} x", "followed by other text"),
        ("[" * 100, "nested too deeply"),
        ('{"a": 1}', "does not describe its tensors"),
        ('{"a": {"dtype": "I8", "shape": [1], "data_offsets": [0, 1]}, "a": {}}', "a name twice"),
        ('{"a": {"dtype": "F64", "shape": [1], "data_offsets": [0, 8]}}', "other types"),
        ('{"a": {"dtype": "I8", "shape": [2], "data_offsets": [0, 1]}}', "does not fit its shape"),
        ('{"a": {"dtype": "I8", "shape": [-1], "data_offsets": [0, 1]}}', "expected an integer"),
        ('{"a": {"dtype": "I8", "shape": [1e3], "data_offsets": [0, 1]}}', "expected an integer"),
        ('{"a": {"dtype": "F32", "shape": [1, 999999999999], "data_offsets": [0, 8]}}', "expected at most"),
        ('{"a": {"dtype": "F32", "shape": [8, 8, 8, 8], "data_offsets": [0, 8]}}', "larger than the file"),
        ('{"a": {"dtype": "I8", "shape": [1], "data_offsets": [1, 2]}}', "overlap or leave gaps"),
        ('{"__metadata__": {"a": "\\ud800"}}', "malformed"),
        ('{"__metadata__": {"a": 3}}', "values that are not texts"),
        ('{"__metadata__": {}}', "do not fill it"),
        ('{"a": {"dtype": "I8", "shape": [8], "data_offsets": [0, 8]}}', "not a file that multifire wrote"),
        ('{"__metadata__": {"a": "\\u00zz"}}', "malformed"),
        ('{"__metadata__": {"a": 1.}}', "malformed"),
        (b'{"__metadata__": {"a": "\xff"}}', "not UTF-8"),
        (b'{"__metadata__": {"a": "\xc0\x80"}}', "not UTF-8"),
        (b'{"__metadata__": {"a": "\xed\xa0\x80"}}', "not UTF-8"),
    ],
)
def test_malformed_headers_are_refused(tmp_path, header, message):
    text = header if isinstance(header, bytes) else header.encode()
    path = tmp_path / "a.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(8))
    with pytest.raises(ValueError, match=message):
        native.load(path)


@pytest.mark.parametrize(
    ("alter", "message"),
    [
        (lambda t, h: t.pop("voting.weight"), "lacks the tensor voting.weight"),
        (lambda t, h: t.update(extra=torch.zeros(1)), "tensors that its network does not have"),
        (lambda t, h: t.update({"stem.scale": torch.ones(9)}), "stem.scale does not fit"),
        (lambda t, h: t.update({"stem.conv.weight": t["stem.conv.weight"].float()}), "stem.conv.weight does not fit"),
        (lambda t, h: t["stem.scale"].fill_(float("nan")), "stem.scale contains values that are not finite"),
        (lambda t, h: t["stem.mean"].fill_(float("inf")), "stem.mean contains values that are not finite"),
        (lambda t, h: t["stages.0.0.fire1.conv.weight"].fill_(-128), "contains -128"),
        (lambda t, h: t["stages.0.0.fire1.scale"].fill_(1e35), "may overflow"),
        (lambda t, h: h["network"]["model"].update(width=10**9), "expected at most 1024"),
        (lambda t, h: h["network"]["model"].update(width=16), "does not fit"),
        (lambda t, h: h["network"]["model"].update(name="ds_resnet6000002"), "expected ds_resnet of depth 6n"),
        (lambda t, h: h["network"]["model"].update(name="ds_resnet386"), "activations may reach 195"),
        (lambda t, h: h["network"]["model"].update(name="ds_resnet14"), "lacks the tensor stages.0.1"),
        (lambda t, h: h["network"]["model"].update(name="plain_resnet8"), "expected ds_resnet"),
        (lambda t, h: h["network"]["model"].update(num_classes=10**12), "expected at most"),
        (lambda t, h: h["network"]["model"].update(levels="3"), "its levels: found 3, expected an integer"),
        (
            lambda t, h: h["network"]["model"].update(decay=True),
            "its decay: found another kind of value, expected a finite",
        ),
        (lambda t, h: h["network"]["model"].update(levels=9), "its levels: found 9, expected at most 8"),
        (lambda t, h: h["network"]["model"].update(levels=0), "expected at least 1"),
        (lambda t, h: h["network"]["model"].update(thresholds=[1.0]), "not one for each level"),
        (lambda t, h: h["network"]["model"].update(thresholds=[1e300, 1, 2]), "not finite in float32"),
        (lambda t, h: h["network"]["model"].update(decay=1e300), "not finite in float32"),
        (lambda t, h: h["network"]["model"].update(decay=float("nan")), "malformed"),
        (lambda t, h: h["network"]["model"].update(learn_decay=True), "learn_decay, which the engine does not support"),
        (lambda t, h: h["network"]["model"].update(signed=True), "signed"),
        (lambda t, h: h["network"]["model"].update(membranes="shared"), "do not go together"),
        (lambda t, h: h["network"]["model"].update(wdth=3), 'unknown field "wdth"'),
        (lambda t, h: h["network"].update(model=3), "does not describe its network"),
        (lambda t, h: h["network"].update(counts="yes"), "not true or false"),
        (lambda t, h: h["network"].update(counts=False), "does not fit"),
        (lambda t, h: h.update(network=[]), "does not describe its network"),
    ],
)
def test_invalid_contents_with_a_valid_digest_are_refused(saved, alter, message):
    header, tensors = read_tensors(saved, {"int8": 1})
    header.pop("digest")
    values = {"network": json.loads(header["network"])}
    alter(tensors, values)
    write_tensors(saved, tensors, header | {name: json.dumps(value) for name, value in values.items()})
    with pytest.raises(ValueError, match=message):
        native.load(saved)


@pytest.mark.parametrize(
    ("change", "message"), [({"kind": "checkpoint"}, "not an int8 network"), ({"multifire": "2"}, "another version")]
)
def test_other_kinds_and_versions_are_refused(saved, change, message):
    header, tensors = read_tensors(saved, {"int8": 1})
    header.pop("digest")
    write_tensors(saved, tensors, header | change)
    with pytest.raises(ValueError, match=message):
        native.load(saved)


def test_names_and_texts_of_any_script_are_read(saved):
    header, tensors = read_tensors(saved, {"int8": 1})
    header.pop("digest")
    text = 'ÄÖ "quoted" \\ \n\t\b\f\r\x01\x7f \u2028 \ufffd 漢字 😀'
    write_tensors(saved, tensors, header | {"note": text, text: "note"})
    assert native.load(saved).info.classes == 3
