"""What an exported file says of itself, and which files are refused."""

import json
import random

import pytest
import torch

from multifire import config as configs
from multifire.checkpoint import Checkpoint, Position, digest_of, save_checkpoint, write_tensors
from multifire.cli import main
from multifire.config import DataConfig, ModelConfig, RunConfig
from multifire.export import make_passport
from multifire.export.passport import KINDS, inspect, read_passport
from multifire.nn import model_from_config

CONFIG = RunConfig(data=DataConfig(name="digits"), model=ModelConfig(name="ds_resnet8", width=2, in_channels=1))


@pytest.fixture
def run(tmp_path):
    """A run's folder with one checkpoint, which was not scored."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.json").write_text(configs.to_json(CONFIG))
    weights = model_from_config(CONFIG.model).state_dict()
    save_checkpoint(folder / "last.safetensors", Checkpoint(CONFIG, Position(epoch=3), weights, {}))
    return folder


def test_says_where_a_network_came_from(run):
    passport = make_passport(run)
    assert passport["recipe"] == "digits"
    assert passport["data"]["classes"] == tuple("0123456789")
    assert passport["accuracy"] == []
    assert passport["checkpoint"] == {
        "file": "last.safetensors",
        "epochs": 3,
        "sha256": digest_of(run / "last.safetensors"),
    }
    again = read_passport(json.dumps(passport), "x")
    assert configs.from_json(json.dumps({"version": configs.CONFIG_VERSION, **again["config"]}), "x") == CONFIG


def test_accuracy_is_that_of_this_checkpoint(run):
    """A figure of another checkpoint, or of one that was trained on since, is none of this one."""
    summary = {"test_accuracy": 0.5, "test_accuracy_of": "last", "epochs": 2}
    (run / "summary.json").write_text(json.dumps(summary))
    (run / "eval-last.json").write_text(json.dumps({"accuracy": 0.6, "digest": "0" * 64}))
    assert make_passport(run)["accuracy"] == []
    (run / "summary.json").write_text(json.dumps(summary | {"epochs": 3}))
    assert [one["value"] for one in make_passport(run)["accuracy"]] == [0.5]
    scored = {"accuracy": 0.6, "digest": digest_of(run / "last.safetensors")}
    (run / "eval-last.json").write_text(json.dumps(scored))
    (accuracy,) = make_passport(run)["accuracy"]
    assert accuracy["value"] == 0.6
    assert accuracy["on"] == "digits's test set, T = 4"


def test_energy_is_that_of_this_checkpoint_and_says_how_it_was_counted(run, capsys):
    energy = {"snn_pj": 510032.35, "synops": 419175.5, "macs": 28864.0, "ac_pj": 0.9, "mac_pj": 4.6}
    analysis = {"split": "test", "checkpoint": "last", "samples": 32, "energy": {**energy, "connections": []}}
    (run / "analysis.json").write_text(json.dumps(analysis))
    assert make_passport(run)["energy"] is None, "no summary says that it is of this epoch"
    summary = {"test_accuracy": 0.5, "test_accuracy_of": "last", "epochs": 3}
    (run / "summary.json").write_text(json.dumps(summary))
    assert make_passport(run)["energy"] == {**energy, "on": "32 test samples"}
    assert main(["inspect", str(run / "last.safetensors")]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "0.51 µJ an inference of the checkpoint, counted" in said
    assert "419,176 accumulates of 0.9 pJ and 28,864 multiply-accumulates of 4.6 pJ (45 nm), mean of 32 test" in said
    for change in ({"checkpoint": "best by validation"}, {"energy": {**energy, "macs": None}}, {"energy": [1]}):
        (run / "analysis.json").write_text(json.dumps(analysis | change))
        assert make_passport(run)["energy"] is None
    (run / "summary.json").write_text(json.dumps(summary | {"epochs": 2}))
    (run / "analysis.json").write_text(json.dumps(analysis))
    assert make_passport(run)["energy"] is None


def test_inspect_shows_a_checkpoint(run, capsys):
    assert main(["inspect", str(run / "last.safetensors")]) == 0
    said = capsys.readouterr().out
    assert "whole; checkpoint" in said
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
    with pytest.raises(ValueError, match="a folder, expected a file"):
        inspect(tmp_path)
    with pytest.raises(FileNotFoundError, match="no such checkpoint"):
        inspect(tmp_path / "none.safetensors")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON"),
        ("[]", "of version None"),
        ('{"passport": 7}', "of version 7, expected 1"),
        ('{"passport": 1}', "does not say its recipe, config"),
        ("[" * 100_000, "not JSON"),
    ],
)
def test_no_passport(text, message):
    with pytest.raises(ValueError, match=rf"x\.nir: its passport is {message}|x\.nir: its passport {message}"):
        read_passport(text, "x.nir")


@pytest.mark.parametrize("field", ["config", "data", "accuracy", "checkpoint", "versions"])
@pytest.mark.parametrize("value", [None, 3, "x", [3]])
def test_a_strangers_passport_is_refused(run, field, value):
    passport = make_passport(run) | {field: value}
    with pytest.raises(ValueError, match="malformed"):
        read_passport(json.dumps(passport), "x")


@pytest.mark.parametrize("energy", [3, "x", [3], {}, {"snn_pj": "1"}])
def test_a_strangers_energy_is_refused(run, energy):
    with pytest.raises(ValueError, match="malformed"):
        read_passport(json.dumps(make_passport(run) | {"energy": energy}), "x")


def test_what_a_file_says_cannot_drive_the_terminal(run, capsys):
    passport = make_passport(run) | {"recipe": "\x1b[2Jevil\n"}
    path = run / "a.safetensors"
    header = {"multifire": str(KINDS["int8"]), "kind": "int8", "passport": json.dumps(passport)}
    write_tensors(path, {"w": torch.zeros(3)}, header)
    assert main(["inspect", str(path)]) == 0
    said = capsys.readouterr().out
    assert "\\x1b[2Jevil\\n" in said
    assert "\x1b" not in said
