"""What an exported file says of itself, and which files are refused."""

import json
import random

import pytest
import torch

import multifire as mf
from multifire.cli import main
from multifire.config import DataConfig, ModelConfig, RunConfig, json_format
from multifire.export import int8, make_provenance, nir, onnx, pretrained
from multifire.export import provenance as provenances
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
    """A run's folder with one checkpoint, which was not scored."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.json").write_text(json_format.to_json(CONFIG))
    weights = model_from_config(CONFIG.model).state_dict()
    save_checkpoint(folder / "last.safetensors", Checkpoint(CONFIG, Position(epoch=3), weights, {}))
    return folder


def test_says_where_a_network_came_from(run):
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


def test_accuracy_is_that_of_this_checkpoint(run):
    """A figure of another checkpoint, or of one that was trained on since, is none of this one."""
    summary = {"test_accuracy": 0.5, "test_accuracy_of": "last", "epochs": 2}
    (run / "summary.json").write_text(json.dumps(summary))
    (run / "eval-last.json").write_text(json.dumps({"accuracy": 0.6, "digest": "0" * 64}))
    assert make_provenance(run)["accuracy"] == []
    (run / "summary.json").write_text(json.dumps(summary | {"epochs": 3}))
    assert [one["value"] for one in make_provenance(run)["accuracy"]] == [0.5]
    scored = {"accuracy": 0.6, "digest": digest_of(run / "last.safetensors")}
    (run / "eval-last.json").write_text(json.dumps(scored))
    (accuracy,) = make_provenance(run)["accuracy"]
    assert accuracy["value"] == 0.6
    assert accuracy["on"] == "digits's test set, T = 4"


def test_energy_is_that_of_this_checkpoint_and_says_how_it_was_counted(run, capsys):
    energy = {"snn_pj": 510032.35, "synops": 419175.5, "macs": 28864.0, "ac_pj": 0.9, "mac_pj": 4.6}
    analysis = {"split": "test", "checkpoint": "last", "samples": 32, "energy": {**energy, "connections": []}}
    (run / "analysis.json").write_text(json.dumps(analysis))
    assert make_provenance(run)["energy"] is None, "no summary says that it is of this epoch"
    summary = {"test_accuracy": 0.5, "test_accuracy_of": "last", "epochs": 3}
    (run / "summary.json").write_text(json.dumps(summary))
    assert make_provenance(run)["energy"] == {**energy, "on": "32 test samples"}
    assert main(["inspect", str(run / "last.safetensors")]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "0.51 µJ an inference of the checkpoint, counted" in said
    assert "419,176 accumulates of 0.9 pJ and 28,864 multiply-accumulates of 4.6 pJ (45 nm), mean of 32 test" in said
    for change in ({"checkpoint": "best by validation"}, {"energy": {**energy, "macs": None}}, {"energy": [1]}):
        (run / "analysis.json").write_text(json.dumps(analysis | change))
        assert make_provenance(run)["energy"] is None
    (run / "summary.json").write_text(json.dumps(summary | {"epochs": 2}))
    (run / "analysis.json").write_text(json.dumps(analysis))
    assert make_provenance(run)["energy"] is None


def test_inspect_shows_a_checkpoint(run, capsys):
    assert main(["inspect", str(run / "last.safetensors")]) == 0
    said = capsys.readouterr().out
    assert "intact; checkpoint" in said
    assert digest_of(run / "last.safetensors") in said
    assert "ds_resnet8, width 2, K = 3" in said


def test_inspect_refuses_damaged_files(run, capsys):
    path = run / "last.safetensors"
    whole = path.read_bytes()
    chance = random.Random(0)
    for _ in range(20):
        altered, where = bytearray(whole), chance.randrange(len(whole))
        altered[where] ^= 1 << chance.randrange(8)
        path.write_bytes(altered)
        assert main(["inspect", str(path)]) == 2
    for length in (0, 9, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        assert main(["inspect", str(path)]) == 2
    assert "damaged" in capsys.readouterr().err


def test_inspect_refuses_what_is_no_file_of_ours(tmp_path):
    with pytest.raises(ValueError, match="a folder, expected one"):
        inspect(tmp_path)
    with pytest.raises(FileNotFoundError, match="no such file"):
        inspect(tmp_path / "none.safetensors")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON"),
        ("[]", "of version None"),
        ('{"provenance": 7}', "of version 7, expected 1"),
        ('{"provenance": 1}', "does not say its recipe, config"),
        ("[" * 100_000, "not JSON"),
    ],
)
def test_no_provenance(text, message):
    with pytest.raises(ValueError, match=rf"x\.nir: its provenance is {message}|x\.nir: its provenance {message}"):
        read_provenance(text, "x.nir")


@pytest.mark.parametrize("field", ["config", "data", "accuracy", "checkpoint", "versions"])
@pytest.mark.parametrize("value", [None, 3, "x", [3]])
def test_a_strangers_provenance_is_refused(run, field, value):
    provenance = make_provenance(run) | {field: value}
    with pytest.raises(ValueError, match="malformed"):
        read_provenance(json.dumps(provenance), "x")


@pytest.mark.parametrize("energy", [3, "x", [3], {}, {"snn_pj": "1"}])
def test_a_strangers_energy_is_refused(run, energy):
    with pytest.raises(ValueError, match="malformed"):
        read_provenance(json.dumps(make_provenance(run) | {"energy": energy}), "x")


def test_what_a_file_says_cannot_drive_the_terminal(run, capsys):
    provenance = make_provenance(run) | {"recipe": "\x1b[2Jevil\n"}
    path = run / "a.safetensors"
    header = {"multifire": str(KINDS["int8"]), "kind": "int8", "provenance": json.dumps(provenance)}
    write_tensors(path, {"w": torch.zeros(3)}, header)
    assert main(["inspect", str(path)]) == 0
    said = capsys.readouterr().out
    assert "\\x1b[2Jevil\\n" in said
    assert "\x1b" not in said


FORMATS = {"onnx": "onnxruntime", "nir": "nir", "pretrained": "torch"}


def exported(run, to):
    pytest.importorskip(FORMATS[to])
    from multifire.export.export_run import write_run

    return write_run(run, to)


@pytest.mark.parametrize("to", FORMATS)
def test_inspect_shows_every_exported_format(run, to, capsys):
    path = exported(run, to)
    assert main(["inspect", str(path)]) == 0
    said = capsys.readouterr().out
    assert f"{path}: intact; " in said
    assert digest_of(run / "last.safetensors") in said
    assert "ds_resnet8, width 2, K = 3" in said


def test_inspect_notices_every_altered_byte_of_onnx(run):
    path = exported(run, "onnx")
    whole, chance = path.read_bytes(), random.Random(0)
    for where in [*(chance.randrange(len(whole)) for _ in range(100)), *range(len(whole) - 80, len(whole))]:
        altered = bytearray(whole)
        altered[where] ^= 1 << chance.randrange(8)
        path.write_bytes(altered)
        with pytest.raises(ValueError, match=r"last\.onnx: "):
            inspect(path)
    for length in (0, 1, 76, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="cut short"):
            inspect(path)


def test_a_digest_does_not_change_an_onnx_model(run):
    """The digest is one more pair among the metadata, and stays where it is when ONNX writes the file again."""
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
def test_inspect_refuses_a_strangers_onnx(tmp_path, content, message):
    """With a digest that fits, as anybody can compute one."""
    (tmp_path / "a.onnx").write_bytes(append_digest(content))
    with pytest.raises(ValueError, match=message):
        inspect(tmp_path / "a.onnx")


def test_inspect_refuses_altered_nir(run):
    h5py = pytest.importorskip("h5py")
    path = exported(run, "nir")
    whole = path.read_bytes()
    weight, edges = "node/nodes/stem_conv/weight", "node/edges"
    for change, message in (
        (lambda f: f[weight].__setitem__(0, 1), "does not match its digest"),
        (lambda f: f[edges].__setitem__((0, 0), "another"), "does not match its digest"),
        (lambda f: f.__setitem__("node/metadata/more", "x"), "does not match its digest"),
        (lambda f: f["node/metadata/provenance"].__setitem__((), "{}"), "does not match its digest"),
        (lambda f: f.__delitem__(weight), "does not match its digest"),
        (lambda f: f.__delitem__("node/metadata/digest"), "without provenance or digest"),
        (lambda f: f.__delitem__("node"), "without provenance or digest"),
        (lambda f: f.__setitem__("node/loop", f["node"]), "too deep or too many"),
        (lambda f: f.__setitem__("node/away", h5py.ExternalLink("/etc/hostname", "/")), "link to elsewhere"),
        (lambda f: f.create_dataset("big", (1 << 28,), "f4", compression="gzip"), "unpacks to more than"),
        (lambda f: f.create_dataset("big", (1,), "f4", maxshape=(None,), chunks=(1 << 28,)), "unpacks to more than"),
        (lambda f: _same_text(f, ("x" * 1000,) * 2, 50_000), "of text"),
        (lambda f: _same_text(f, ("x",) * 3, 5), "expected pairs"),
    ):
        path.write_bytes(whole)
        with h5py.File(path, "r+") as file:
            change(file)
        with pytest.raises(ValueError, match=message):
            inspect(path)
    for length in (0, 8, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="damaged"):
            inspect(path)
    with h5py.File(path, "w") as file:
        file["data"] = [1.0]
    with pytest.raises(ValueError, match="without provenance or digest"):
        inspect(path)


def _same_text(file, texts, times):
    import h5py

    rows = file.create_dataset("rows", (times, len(texts)), h5py.string_dtype(), compression="gzip")
    rows[...] = [texts] * times


def test_inspect_notices_damaged_bytes_of_nir(run):
    """A byte that the file's format leaves unused may change; none that the provenance or the graph is made of."""
    path = exported(run, "nir")
    whole, chance, said = path.read_bytes(), random.Random(0), inspect(path)
    provenance = range(whole.index(b'"recipe"'), whole.index(b'"versions"'))
    for where in [*(chance.randrange(len(whole)) for _ in range(60)), *chance.sample(provenance, 20)]:
        altered = bytearray(whole)
        altered[where] ^= 1 << chance.randrange(7)
        path.write_bytes(altered)
        try:
            found = inspect(path)
        except ValueError as error:
            found = str(error)
        assert (found == said and where not in provenance) or found[: len(str(path))] == str(path)


def test_inspect_refuses_altered_folders(run):
    folder = exported(run, "pretrained")
    config, weights = folder / "config.json", folder / "model.safetensors"
    described, held = config.read_bytes(), weights.read_bytes()
    config.write_bytes(described.replace(b'"recipe": "digits"', b'"recipe": "cifar"'))
    assert config.read_bytes() != described
    with pytest.raises(ValueError, match="altered"):
        inspect(folder)
    config.write_bytes(described[: len(described) // 2])
    with pytest.raises(ValueError, match="not the configuration"):
        inspect(folder)
    config.write_bytes(described)
    weights.write_bytes(held[:-1] + bytes([held[-1] ^ 1]))
    with pytest.raises(ValueError, match="digest"):
        inspect(folder)
    weights.write_bytes(held[:-1])
    with pytest.raises(ValueError, match="damaged"):
        inspect(folder)
    weights.write_bytes((run / "last.safetensors").read_bytes())
    with pytest.raises(ValueError, match="a multifire checkpoint"):
        inspect(folder)
    save_pretrained(model_from_config(CONFIG.model), folder)
    with pytest.raises(ValueError, match="without provenance"):
        inspect(folder)
    config.unlink()
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        inspect(folder)


@pytest.mark.parametrize("to", ["int8", "onnx", "nir", "pretrained"])
def test_files_of_earlier_versions_are_read(run, monkeypatch, tmp_path, to):
    """They call the provenance a passport, in their headers and in the JSON object."""
    out = tmp_path / f"net.{to}"
    with monkeypatch.context() as patch:
        for module in (int8, nir, onnx, pretrained, provenances):
            patch.setattr(module, "KEY", "passport")
        assert main(["export", str(run), "--to", to, "--out", str(out)]) == 0
    _, found = inspect(out)
    assert found["passport"] == 1
    assert "provenance" not in found
    if to == "int8":
        assert mf.load_int8(out).provenance == found
    if to == "pretrained":
        assert isinstance(mf.from_pretrained(out), mf.SpikingResNet)
