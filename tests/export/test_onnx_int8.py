"""int8 networks as ONNX files: ONNX Runtime computes the integers that our int8 network computes."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("onnxruntime")

import onnx
import onnxruntime

import multifire as mf
from multifire.cli import main
from multifire.config import ModelConfig
from multifire.export import fold, make_provenance, onnx_int8
from multifire.export.int8 import Int8Conv2d, quantise_network, save_int8
from multifire.export.onnx import onnx_graph, run_frames, write_onnx
from multifire.export.onnx_int8 import Int8Step, write_onnx_int8
from tests.export.test_int8 import COUNTS, IMAGES, inputs, trained
from tests.export.test_provenance import run  # noqa: F401 - a fixture

SIZE = (12, 12)
IMAGES_NORMED = dataclasses.replace(COUNTS, levels=2)
EXAMPLE = Path(__file__).parents[2] / "examples" / "run_onnx.py"


def session(path) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("step", [False, True])
@pytest.mark.parametrize(("model", "counts"), [(IMAGES, False), (COUNTS, True), (IMAGES_NORMED, False)])
def test_onnx_file_equals_the_saved_int8_network(tmp_path, run, model, counts, step):  # noqa: F811
    net = trained(model)
    save_int8(tmp_path / "a.safetensors", quantise_network(net, model, counts), make_provenance(run))
    ours = mf.load_int8(tmp_path / "a.safetensors")
    write_onnx_int8(tmp_path / "a.onnx", net, ours, SIZE, {}, step=step)
    written = onnx.load(tmp_path / "a.onnx")
    for frames, samples in ((1, 1), (4, 11)):
        x = inputs(model, frames, samples)
        expected = ours(x).numpy()
        found = run_frames(session(tmp_path / "a.onnx").run, written, np.ascontiguousarray(x.numpy()), step)
        assert (found.argmax(1) == expected.argmax(1)).all()
        assert np.median(np.abs(found - expected).max(1)) < 1e-4 * expected.std()


@pytest.mark.parametrize(("model", "counts"), [(IMAGES, False), (COUNTS, True)])
def test_sums_are_exact(model, counts):
    """The sums of every int8 layer, compared with float64 ones of the same input in the graph."""
    net = trained(model)
    network = quantise_network(net, model, counts)
    step = onnx_graph(fold(net), SIZE, step=True, target=Int8Step(SIZE, network))
    convs = {node.output[0]: node.input[0] for node in step.graph.node if node.output[0].endswith(".sums")}
    int8_convs = [module for module in network.modules() if isinstance(module, Int8Conv2d)]
    assert len(convs) == len(int8_convs)
    names = [name for name in [*convs, *convs.values()] if name != "frame"]
    x = inputs(model, 1, 8)
    found = onnx_int8._onnx_activations(step, dict.fromkeys(names), x) | {"frame": x.numpy()}
    for sums, before in convs.items():
        conv = network.network.get_submodule(sums.removesuffix(".sums"))
        exact = torch.nn.functional.conv2d(
            torch.from_numpy(found[before][0]).double(), conv.weight.double(), None, conv.stride, conv.padding
        )
        assert np.array_equal(found[sums][0].astype(np.float64), exact.numpy())
        assert np.abs(found[sums]).max() > 100


def test_int8_file_is_smaller(tmp_path):
    model = ModelConfig(name="ds_resnet8", in_channels=2, width=32, norm_input=True)
    net = trained(model)
    write_onnx(tmp_path / "float.onnx", net, SIZE, {})
    write_onnx_int8(tmp_path / "int8.onnx", net, quantise_network(net, model, counts=True), SIZE, {})
    assert (tmp_path / "int8.onnx").stat().st_size < 0.35 * (tmp_path / "float.onnx").stat().st_size


@pytest.mark.parametrize("wrong", ["scale", "bias"])
def test_wrong_graph_is_not_written(tmp_path, monkeypatch, wrong):
    net = trained(COUNTS)
    constant = Int8Step.constant
    monkeypatch.setattr(
        Int8Step,
        "constant",
        lambda self, name, value: constant(self, name, value * 1.1 if name.endswith(f"fire1.conv.{wrong}") else value),
    )
    with pytest.raises(ValueError, match=r"differ in ONNX Runtime, expected .*; nothing is written"):
        write_onnx_int8(tmp_path / "a.onnx", net, quantise_network(net, COUNTS, counts=True), SIZE, {})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("step", [False, True])
def test_exported_file_runs_in_the_example(run, tmp_path, capsys, step):  # noqa: F811
    path = tmp_path / "net.onnx"
    assert main(["export", str(run), "--to", "onnx-int8", "--out", str(path), *["--step"] * step]) == 0
    assert "onnx-int8: 0.0" in capsys.readouterr().out
    assert main(["inspect", str(path)]) == 0
    assert f"ONNX {'step' if step else 'sequence'}, weights in int8" in capsys.readouterr().out
    assert main(["export", str(run), "--to", "int8"]) == 0
    x = torch.randn(3, 5, 1, 28, 28)
    expected = mf.load_int8(run / "last-int8.safetensors")(x).argmax(1)
    np.save(tmp_path / "frames.npy", x.numpy())
    command = [sys.executable, "-I", str(EXAMPLE), str(path), str(tmp_path / "frames.npy")]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert printed == [str(int(label)) for label in expected]
