"""The provenance of exported files, files of earlier versions, and refused files."""

import importlib
import json
import random

import pytest
import torch

import multifire as mf
from multifire.cli import main
from multifire.config import DataConfig, ModelConfig, RunConfig, json_format
from multifire.export import make_provenance
from multifire.export.inspection import inspect
from multifire.export.onnx_digest import append_digest
from multifire.export.pretrained import save_pretrained
from multifire.export.provenance import KINDS, read_provenance
from multifire.nn import model_from_config
from multifire.training.checkpoint import Checkpoint, Position, save_checkpoint
from multifire.utils.tensor_files import digest_of, write_tensors

CONFIG = RunConfig(data=DataConfig(name="digits"), model=ModelConfig(name="ds_resnet8", width=2, in_channels=1))


@pytest.fixture
def run(tmp_path):
    """Create a run with one checkpoint whose accuracy is not measured; return its folder."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.json").write_text(json_format.to_json(CONFIG))
    weights = model_from_config(CONFIG.model).state_dict()
    save_checkpoint(folder / "last.safetensors", Checkpoint(CONFIG, Position(epoch=3), weights, {}))
    return folder


def test_provenance_names_recipe_data_and_checkpoint(run):
    provenance = make_provenance(run)
    assert provenance["recipe"] == "digits"
    assert provenance["data"]["classes"] == tuple("0123456789")
    assert provenance["accuracy"] == []
    assert provenance["checkpoint"] == {
        "file": "last.safetensors",
        "epochs": 3,
        "sha256": digest_of(run / "last.safetensors"),
    }
    again = read_provenance(json.dumps(provenance), "x")
    assert json_format.from_json(json.dumps({"version": json_format.CONFIG_VERSION, **again["config"]}), "x") == CONFIG


def test_accuracy_is_that_of_exactly_this_checkpoint(run):
    """Accuracies of another checkpoint, or of an earlier epoch, are left out."""
    summary = {"test_accuracy": 0.5, "test_accuracy_of": "last", "epochs": 2}
    (run / "summary.json").write_text(json.dumps(summary))
    (run / "eval-last.json").write_text(json.dumps({"accuracy": 0.6, "digest": "0" * 64}))
    assert make_provenance(run)["accuracy"] == []
    (run / "summary.json").write_text(json.dumps(summary | {"epochs": 3}))
    assert [record["value"] for record in make_provenance(run)["accuracy"]] == [0.5]
    evaluation = {"accuracy": 0.6, "digest": digest_of(run / "last.safetensors")}
    (run / "eval-last.json").write_text(json.dumps(evaluation))
    (accuracy,) = make_provenance(run)["accuracy"]
    assert accuracy["value"] == 0.6
    assert accuracy["on"] == "digits's test set, T = 4"


def test_energy_is_that_of_exactly_this_checkpoint(run, capsys):
    energy = {"snn_pj": 510032.35, "synops": 419175.5, "macs": 28864.0, "ac_pj": 0.9, "mac_pj": 4.6}
    analysis = {"split": "test", "checkpoint": "last", "samples": 32, "energy": {**energy, "connections": []}}
    (run / "analysis.json").write_text(json.dumps(analysis))
    assert make_provenance(run)["energy"] is None, "without a summary its epoch is unknown"
    summary = {"test_accuracy": 0.5, "test_accuracy_of": "last", "epochs": 3}
    (run / "summary.json").write_text(json.dumps(summary))
    assert make_provenance(run)["energy"] == {**energy, "on": "32 test samples"}
    assert main(["inspect", str(run / "last.safetensors")]) == 0
    output = " ".join(capsys.readouterr().out.split())
    assert "0.51 µJ an inference of the checkpoint, counted" in output
    assert "419,176 accumulates of 0.9 pJ and 28,864 multiply-accumulates of 4.6 pJ (45 nm), mean of 32 test" in output
    for change in ({"checkpoint": "best by validation"}, {"energy": {**energy, "macs": None}}, {"energy": [1]}):
        (run / "analysis.json").write_text(json.dumps(analysis | change))
        assert make_provenance(run)["energy"] is None
    (run / "summary.json").write_text(json.dumps(summary | {"epochs": 2}))
    (run / "analysis.json").write_text(json.dumps(analysis))
    assert make_provenance(run)["energy"] is None


def test_inspect_shows_a_checkpoint(run, capsys):
    assert main(["inspect", str(run / "last.safetensors")]) == 0
    output = capsys.readouterr().out
    assert "intact; checkpoint" in output
    assert digest_of(run / "last.safetensors") in output
    assert "ds_resnet8, width 2, K = 3" in output


def test_inspect_refuses_damaged_files(run, capsys):
    path = run / "last.safetensors"
    content = path.read_bytes()
    rng = random.Random(0)
    for _ in range(20):
        altered, position = bytearray(content), rng.randrange(len(content))
        altered[position] ^= 1 << rng.randrange(8)
        path.write_bytes(altered)
        assert main(["inspect", str(path)]) == 2
    for length in (0, 9, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:length])
        assert main(["inspect", str(path)]) == 2
    assert "damaged" in capsys.readouterr().err


def test_inspect_refuses_other_paths(tmp_path):
    with pytest.raises(ValueError, match=r"a folder without model\.safetensors, expected one"):
        inspect(tmp_path)
    with pytest.raises(FileNotFoundError, match="no such file"):
        inspect(tmp_path / "none.safetensors")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON"),
        ("[]", "of version None"),
        ('{"provenance": 7}', "of version 7, expected 1"),
        ('{"provenance": 1}', "lacks recipe, config"),
        ("[" * 100_000, "not JSON"),
    ],
)
def test_invalid_provenance_is_refused(text, message):
    with pytest.raises(ValueError, match=rf"x\.nir: its provenance is {message}|x\.nir: its provenance {message}"):
        read_provenance(text, "x.nir")


@pytest.mark.parametrize("field", ["config", "data", "accuracy", "checkpoint", "versions"])
@pytest.mark.parametrize("value", [None, 3, "x", [3]])
def test_malformed_provenance_is_refused(run, field, value):
    provenance = make_provenance(run) | {field: value}
    with pytest.raises(ValueError, match="malformed"):
        read_provenance(json.dumps(provenance), "x")


@pytest.mark.parametrize("energy", [3, "x", [3], {}, {"snn_pj": "1"}])
def test_malformed_energy_is_refused(run, energy):
    with pytest.raises(ValueError, match="malformed"):
        read_provenance(json.dumps(make_provenance(run) | {"energy": energy}), "x")


def test_control_characters_are_escaped(run, capsys):
    provenance = make_provenance(run) | {"recipe": "\x1b[2Jevil\n"}
    path = run / "a.safetensors"
    header = {"multifire": str(KINDS["int8"]), "kind": "int8", "provenance": json.dumps(provenance)}
    write_tensors(path, {"w": torch.zeros(3)}, header)
    assert main(["inspect", str(path)]) == 0
    output = capsys.readouterr().out
    assert "\\x1b[2Jevil\\n" in output
    assert "\x1b" not in output


FORMATS = {"onnx": "onnxruntime", "nir": "nir", "pretrained": "torch"}


def exported(run, to):
    pytest.importorskip(FORMATS[to])
    from multifire.export.export_run import write_run

    return write_run(run, to)


@pytest.mark.parametrize("to", FORMATS)
def test_inspect_shows_every_exported_format(run, to, capsys):
    path = exported(run, to)
    assert main(["inspect", str(path)]) == 0
    output = capsys.readouterr().out
    assert f"{path}: intact; " in output
    assert digest_of(run / "last.safetensors") in output
    assert "ds_resnet8, width 2, K = 3" in output


def test_inspect_detects_every_altered_byte_of_onnx(run):
    path = exported(run, "onnx")
    content, rng = path.read_bytes(), random.Random(0)
    size = len(content)
    for position in [*(rng.randrange(size) for _ in range(100)), *range(size - 80, size)]:
        altered = bytearray(content)
        altered[position] ^= 1 << rng.randrange(8)
        path.write_bytes(altered)
        with pytest.raises(ValueError, match=r"last\.onnx: "):
            inspect(path)
    for length in (0, 1, 76, size // 2, size - 1):
        path.write_bytes(content[:length])
        with pytest.raises(ValueError, match="cut short"):
            inspect(path)


def test_onnx_reads_and_writes_the_digest_as_metadata(run):
    """The digest is the last entry of the metadata, also after the onnx package has written the file again."""
    onnx = pytest.importorskip("onnx")
    path = exported(run, "onnx")
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    assert [pair.key for pair in model.metadata_props][-1] == "digest"
    onnx.save(model, path)
    inspect(path)
    model.producer_name = "another"
    onnx.save(model, path)
    with pytest.raises(ValueError, match="does not match its digest"):
        inspect(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\x08\x09", "of version None"),
        (b"\x08\x09" + b"\x72\x0d\x0a\x0aprovenance\x12\x011", r"field beyond its end|not an ONNX"),
        (b"\x08\x09" + b"\x72\x0f\x0a\x0aprovenance\x12\x017", "of version None"),
        (b"\x08\x09" + b"\x72\xff\xff\xff\xff\x0f", "field beyond its end"),
        (b"\x08\x09" + b"\x08\x09" * 20_000, "more than 10,000 fields"),
        (b"\x08\x09" + b"\x0b", "field of kind 3"),
        (b"\x08" + b"\xff" * 20, "more than 64 bits"),
        (b"\x08\x09" + b"\x72\x80\x80\x80\x10" + b"\0" * (32 << 20), "more than 16 MB of metadata"),
    ],
)
def test_inspect_refuses_invalid_onnx_with_a_valid_digest(tmp_path, content, message):
    (tmp_path / "a.onnx").write_bytes(append_digest(content))
    with pytest.raises(ValueError, match=message):
        inspect(tmp_path / "a.onnx")


def test_inspect_refuses_altered_nir(run):
    h5py = pytest.importorskip("h5py")
    path = exported(run, "nir")
    content = path.read_bytes()
    weight, edges = "node/nodes/stem_conv/weight", "node/edges"
    for change, message in (
        (lambda f: f[weight].__setitem__(0, 1), "does not match its digest"),
        (lambda f: f[edges].__setitem__((0, 0), "another"), "does not match its digest"),
        (lambda f: f.__setitem__("node/metadata/more", "x"), "does not match its digest"),
        (lambda f: f["node/metadata/provenance"].__setitem__((), "{}"), "does not match its digest"),
        (lambda f: f.__delitem__(weight), "does not match its digest"),
        (lambda f: f.__delitem__("node/metadata/digest"), "without provenance or digest"),
        (lambda f: f.__delitem__("node"), "without provenance or digest"),
        (lambda f: f.__setitem__("node/loop", f["node"]), "one object too many"),
        (lambda f: f.__setitem__("node/away", h5py.ExternalLink("/etc/hostname", "/")), "is a link"),
        (lambda f: f.create_dataset("big", (1 << 28,), "f4", compression="gzip"), "unpacks to more than"),
        (lambda f: f.create_dataset("big", (1,), "f4", maxshape=(None,), chunks=(1 << 28,)), "unpacks to more than"),
        (lambda f: f.create_dataset("rows", (5, 2), h5py.string_dtype(), compression="gzip"), "text in pieces"),
        (lambda f: f.__setitem__("rows", [["x"] * 3] * 5), "expected one text or pairs of names"),
    ):
        path.write_bytes(content)
        with h5py.File(path, "r+") as file:
            change(file)
        with pytest.raises(ValueError, match=message):
            inspect(path)
    for length in (0, 8, 100, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:length])
        with pytest.raises(ValueError, match="damaged"):
            inspect(path)
    with h5py.File(path, "w") as file:
        file["data"] = [1.0]
    with pytest.raises(ValueError, match="without provenance or digest"):
        inspect(path)


def test_inspect_refuses_a_text_that_unpacks_to_many(run):
    h5py = pytest.importorskip("h5py")
    path, count = exported(run, "nir"), 40_000
    with h5py.File(path, "r+") as file:
        file["rows"] = [["x" * 1000, "y"], *[["y", "y"]] * (count // 2 - 1)]
        place = file["rows"].id.get_offset()
    content = bytearray(path.read_bytes())
    content[place : place + 16 * count] = content[place : place + 16] * count  # all refer to the first text
    path.write_bytes(content)
    with pytest.raises(ValueError, match="unpacks to more than 16 MB of text"):
        inspect(path)


def test_inspect_detects_damaged_bytes_of_nir(run):
    """Only bytes that HDF5 leaves unused may change unnoticed, none of the provenance or the graph."""
    path = exported(run, "nir")
    content, rng, expected = path.read_bytes(), random.Random(0), inspect(path)
    provenance = range(content.index(b'"recipe"'), content.index(b'"versions"'))
    for position in [*(rng.randrange(len(content)) for _ in range(60)), *rng.sample(provenance, 20)]:
        altered = bytearray(content)
        altered[position] ^= 1 << rng.randrange(7)
        path.write_bytes(altered)
        try:
            found = inspect(path)
        except ValueError as error:
            found = str(error)
        assert (found == expected and position not in provenance) or found[: len(str(path))] == str(path)


def test_inspect_refuses_altered_folders(run):
    folder = exported(run, "pretrained")
    config, weights = folder / "config.json", folder / "model.safetensors"
    config_bytes, weight_bytes = config.read_bytes(), weights.read_bytes()
    config.write_bytes(config_bytes.replace(b'"recipe": "digits"', b'"recipe": "cifar"'))
    assert config.read_bytes() != config_bytes
    with pytest.raises(ValueError, match="altered"):
        inspect(folder)
    config.write_bytes(config_bytes[: len(config_bytes) // 2])
    with pytest.raises(ValueError, match="not the configuration"):
        inspect(folder)
    config.write_bytes(config_bytes)
    weights.write_bytes(weight_bytes[:-1] + bytes([weight_bytes[-1] ^ 1]))
    with pytest.raises(ValueError, match="digest"):
        inspect(folder)
    weights.write_bytes(weight_bytes[:-1])
    with pytest.raises(ValueError, match="damaged"):
        inspect(folder)
    weights.write_bytes((run / "last.safetensors").read_bytes())
    with pytest.raises(ValueError, match="a multifire checkpoint"):
        inspect(folder)
    save_pretrained(model_from_config(CONFIG.model), folder)
    with pytest.raises(ValueError, match="without provenance"):
        inspect(folder)
    config.unlink()
    with pytest.raises(FileNotFoundError, match=r"contains no config\.json"):
        inspect(folder)


@pytest.mark.parametrize("to", ["int8", *FORMATS])
def test_files_of_earlier_versions_are_read(run, monkeypatch, tmp_path, to):
    """In these files the key is "passport", in the header and in the JSON object."""
    pytest.importorskip(FORMATS.get(to, "torch"))
    out = tmp_path / f"net.{to}"
    with monkeypatch.context() as patch:
        for module in (to, "provenance"):
            patch.setattr(importlib.import_module(f"multifire.export.{module}"), "KEY", "passport")
        assert main(["export", str(run), "--to", to, "--out", str(out)]) == 0
    files = list(out.iterdir()) if out.is_dir() else [out]
    assert not any(b"provenance" in file.read_bytes() for file in files)
    _, found = inspect(out)
    assert found["passport"] == 1
    if to == "int8":
        assert mf.load_int8(out).provenance == found
    if to == "nir":
        assert isinstance(importlib.import_module("multifire.export.nir").from_nir(out), mf.SpikingResNet)
    if to == "pretrained":
        assert isinstance(mf.from_pretrained(out), mf.SpikingResNet)
