"""The networks of the package: each loads, computes what its card says, and goes through the commands as a run does."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import multifire as mf
import multifire.engine
from multifire.cli import main
from multifire.datasets.prepare import prepare
from multifire.experiments.score import evaluate_run
from multifire.export import shipped
from multifire.export.int8 import export_run
from multifire.training.data import load_batches
from multifire.training.load_run import load_run

SHARED = Path(__file__).parents[3] / "shared"
NAMES = shipped.shipped_names()


def accuracy_on_card(name: str) -> float:
    card = (shipped.shipped_run(name) / "README.md").read_text()
    return float(re.search(r"accuracy\*\*: ([\d.]+) %", card)[1])


def test_the_package_contains_networks():
    assert {"cifar10-small", "digits", "nmnist"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_it_loads_by_name_and_its_card_agrees_with_its_summary(name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    model = mf.from_pretrained(name)
    run = load_run(shipped.shipped_run(name))
    assert not model.training
    assert all(torch.equal(tensor, run.model.state_dict()[key]) for key, tensor in model.state_dict().items())
    summary = json.loads((shipped.shipped_run(name) / "summary.json").read_text())
    assert accuracy_on_card(name) == round(100 * summary["test_accuracy"], 2)
    assert run.cfg.data.root == "data"
    assert run.cfg.device == "auto"


@pytest.mark.parametrize("name", NAMES)
def test_it_names_no_folder_of_the_machine_that_trained_it(name):
    """No text in its files is an absolute path; of a checkpoint, the header is text."""
    for path in shipped.shipped_run(name).iterdir():
        content = path.read_bytes()
        if path.suffix == ".safetensors":
            content = content[8 : 8 + int.from_bytes(content[:8], "little")]
        assert b'"/' not in content
        assert b"/tmp/" not in content


def test_digits_reaches_what_its_card_says(tmp_path):
    scored, _ = evaluate_run(shipped.copy_shipped("digits", tmp_path), None, None, "auto", None)
    assert 100 * scored["accuracy"] == pytest.approx(accuracy_on_card("digits"), abs=0.1)


@pytest.mark.slow
def test_cifar10_small_reaches_what_its_card_says(tmp_path, cifar10):
    folder = shipped.copy_shipped("cifar10-small", tmp_path)
    scored, _ = evaluate_run(folder, None, str(cifar10), "auto", None)
    assert 100 * scored["accuracy"] == pytest.approx(accuracy_on_card("cifar10-small"), abs=0.1)


def test_nmnist_reaches_what_its_card_says_and_the_engine_computes_its_bits(tmp_path):
    archive = SHARED / "data" / "nmnist-1100.zip"
    if not archive.is_file():
        pytest.skip("needs shared/data/nmnist-1100.zip")
    (tmp_path / "nmnist").mkdir()
    (tmp_path / "nmnist" / archive.name).symlink_to(archive.resolve())
    folder = shipped.copy_shipped("nmnist", tmp_path)
    cfg = mf.recipe("nmnist", **{"data.root": str(tmp_path)})
    prepare(cfg.data, tmp_path)
    scored, _ = evaluate_run(folder, None, str(tmp_path), "auto", None)
    assert 100 * scored["accuracy"] == accuracy_on_card("nmnist")

    path = export_run(folder, tmp_path / "int8.safetensors").path
    int8, native = mf.load_int8(path), multifire.engine.load(path)
    for x_TNCHW, _ in load_batches(cfg, torch.device("cpu")).test.epoch(0):
        assert np.array_equal(native.run(x_TNCHW.numpy()), int8(x_TNCHW).numpy())


@pytest.fixture
def cifar10(tmp_path):
    """Unpack CIFAR-10, whose images are compressed as JPEG there."""
    tool, archive = SHARED / "tools" / "unpack_cifar10.py", SHARED / "data" / "cifar10-jpeg.tar.xz"
    if not archive.is_file():
        pytest.skip("needs shared/data/cifar10-jpeg.tar.xz")
    subprocess.run([sys.executable, tool, tmp_path / "cifar10", "--archive", archive], check=True)
    return tmp_path


def test_the_commands_take_its_name(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["eval", "digits"]) == 0
    assert f"accuracy {accuracy_on_card('digits'):.2f} %" in capsys.readouterr().out
    copy = Path("runs/pretrained-digits")
    assert (copy / "eval-last.json").is_file()
    assert main(["report", "digits", "--no-measure"]) == 0
    assert (copy / "report.html").is_file()
    assert main(["export", "digits", "--to", "int8", "--measure"]) == 0
    assert mf.load_int8(copy / "last-int8.safetensors")
    assert not list(shipped.shipped_run("digits").glob("eval-*"))


def test_a_run_folder_of_the_same_name_takes_precedence(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    Path("digits").mkdir()
    assert main(["eval", "digits"]) == 2
    assert "digits" in capsys.readouterr().err
    assert not Path("runs").exists()


def test_an_unknown_name_is_one_line(capsys):
    assert main(["eval", "digitz"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    with pytest.raises(FileNotFoundError, match="digitz: no such network in the package; it contains cifar10-small"):
        shipped.shipped_run("digitz")
