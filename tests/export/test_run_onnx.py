"""The example runs an exported network in an environment without torch and multifire."""

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
MIN_MARGIN = 0.05
"""Minimum margin of a sample: another order of sums flips spikes at their thresholds, which changes it by less."""


@pytest.fixture(scope="module")
def python(tmp_path_factory) -> Path:
    """Create a virtual environment with numpy and onnxruntime; return its interpreter."""
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
    """Return test samples [T, N, C, H, W] of large margin, and the names of the classes that the network predicts."""
    model, cfg = load_model(run_folder / "last.safetensors")
    data = datasets.load("digits")
    batches = make_batches(data.test, data.info, cfg.data, batch_size=1000, device=torch.device("cpu"), shuffle=False)
    x_TNCHW, _ = next(iter(batches.epoch(0)))
    with torch.no_grad():
        logits_NL = model(x_TNCHW)
    index_N = (margins(logits_NL) > MIN_MARGIN).nonzero()[:, 0][: FILES * SAMPLES]
    return x_TNCHW[:, index_N], [data.info.classes[label] for label in logits_NL[index_N].argmax(1)]


@pytest.mark.slow
@pytest.mark.parametrize("step", [(), ("--step",)], ids=["sequence", "step"])
def test_example_needs_only_numpy_and_onnxruntime(python, run_folder, samples, step, tmp_path):
    network = tmp_path / "network.onnx"
    assert main(["export", str(run_folder), "--to", "onnx", "--out", str(network), *step]) == 0
    shutil.copy(EXAMPLE, tmp_path)
    x_TNCHW, expected = samples
    printed = []
    for number, part in enumerate(x_TNCHW.split(SAMPLES, 1)):
        np.save(tmp_path / f"frames{number}.npy", part.numpy())
        printed += run(python, EXAMPLE.name, network.name, f"frames{number}.npy", cwd=tmp_path)
    assert len(set(expected)) > 1, "the network predicts one class only, which tests nothing"
    assert len(expected) == FILES * SAMPLES
    assert printed == expected


@pytest.mark.slow
@pytest.mark.parametrize("package", ["torch", "multifire"])
def test_package_is_not_installed(python, package):
    find = "import importlib.util, sys; print(importlib.util.find_spec(sys.argv[1]))"
    assert run(python, "-c", find, package) == ["None"]


def run(python: Path, *args: str, cwd: Path | None = None) -> list[str]:
    """Run a Python program in its virtual environment; return the lines that it prints."""
    done = subprocess.run([python, "-I", *args], cwd=cwd, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()
