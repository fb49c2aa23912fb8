"""The example that runs an exported network, where there is neither torch nor multifire."""

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from multifire import datasets
from multifire.analysis.evaluate import margins
from multifire.cli import main
from multifire.datasets.loader import make_batches
from multifire.training.checkpoint import load_model

EXAMPLE = Path(__file__).parents[2] / "examples" / "run_onnx.py"
FILES, SAMPLES = 2, 24
SURE = 0.05
"""Least margin of a sample: a spike that flips by rounding, as sums go in another order, moves it less."""


@pytest.fixture(scope="module")
def python(tmp_path_factory) -> Path:
    """The interpreter of a fresh venv that holds numpy and onnxruntime, and what these ask for."""
    folder = tmp_path_factory.mktemp("alone") / "venv"
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    python = folder / "bin" / "python"
    install = [python, "-I", "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*install, "numpy", "onnxruntime"], check=True)
    return python


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory) -> Path:
    pytest.importorskip("onnx", reason="the extra `onnx` is not installed")
    folder = tmp_path_factory.mktemp("runs") / "digits"
    options = ("--model.width", "4", "--optim.epochs", "2", "--device", "cpu", "--out", str(folder))
    assert main(["train", "digits", *options]) == 0
    return folder


@pytest.fixture(scope="module")
def samples(run_folder) -> tuple[torch.Tensor, list[str]]:
    """Test samples [T, N, C, H, W] of which the network is sure, and the names of the classes that it predicts."""
    model, cfg = load_model(run_folder / "last.safetensors")
    data = datasets.load("digits")
    batches = make_batches(data.test, data.info, cfg.data, batch_size=1000, device=torch.device("cpu"), shuffle=False)
    x_TNCHW, _ = next(iter(batches.epoch(0)))
    with torch.no_grad():
        logits_NK = model(x_TNCHW)
    sure_N = (margins(logits_NK) > SURE).nonzero()[:, 0][: FILES * SAMPLES]
    return x_TNCHW[:, sure_N], [data.info.classes[label] for label in logits_NK[sure_N].argmax(1)]


@pytest.mark.slow
@pytest.mark.parametrize("step", [(), ("--step",)], ids=["sequence", "step"])
def test_numpy_and_onnxruntime_are_enough(python, run_folder, samples, step, tmp_path):
    network = tmp_path / "network.onnx"
    assert main(["export", str(run_folder), "--to", "onnx", "--out", str(network), *step]) == 0
    shutil.copy(EXAMPLE, tmp_path)
    x_TNCHW, expected = samples
    printed = []
    for number, part in enumerate(x_TNCHW.split(SAMPLES, 1)):
        np.save(tmp_path / f"frames{number}.npy", part.numpy())
        printed += run(python, EXAMPLE.name, network.name, f"frames{number}.npy", cwd=tmp_path)
    assert len(set(expected)) > 1, "a network that always says the same shows nothing"
    assert len(expected) == FILES * SAMPLES
    assert printed == expected


@pytest.mark.slow
@pytest.mark.parametrize("package", ["torch", "multifire"])
def test_there_is_no_such_package(python, package):
    find = "import importlib.util, sys; print(importlib.util.find_spec(sys.argv[1]))"
    assert run(python, "-c", find, package) == ["None"]


def run(python: Path, *args: str, cwd: Path | None = None) -> list[str]:
    """The lines that a Python program prints which sees its venv alone."""
    done = subprocess.run([python, "-I", *args], cwd=cwd, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()
