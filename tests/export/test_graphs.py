"""ONNX, NIR and shared folders: exported networks compute the same, and altered files are refused."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from multifire.export import fold
from multifire.export.pretrained import from_pretrained, save_pretrained
from multifire.nn import build_model

KINDS = [
    ("ds_resnet8", {"in_channels": 2, "norm_input": True}),
    ("plain_resnet8", {"levels": 2, "decay": 0.5}),
    ("ds_resnet14", {"levels": 1}),
]
SIZE = (9, 11)


def trained(name: str, options: dict):
    """Return a network in float64 whose norms and biases are not at their initial values, and an input for it."""
    torch.manual_seed(0)
    model = build_model(name, **{"width": 4, **options}).double()
    x = torch.randn(4, 6, model.in_channels, *SIZE, dtype=torch.float64)
    for _ in range(3):
        model(x)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model.eval(), x


@pytest.mark.parametrize(("name", "options"), KINDS)
@pytest.mark.parametrize("step", [False, True])
def test_onnx_graph_equals_the_network(name, options, step):
    pytest.importorskip("onnxruntime")
    from onnx.reference import ReferenceEvaluator

    from multifire.export.onnx import onnx_graph, run_frames

    model, x = trained(name, options)
    graph = onnx_graph(fold(model), SIZE, step=step, dtype=np.float64)
    found = run_frames(ReferenceEvaluator(graph).run, graph, x.numpy(), step)
    np.testing.assert_allclose(found, model(x).detach().numpy(), atol=1e-8)
    assert {node.domain for node in graph.graph.node} == {""}


def test_onnx_file_has_its_provenance_and_takes_any_number_of_frames_and_samples(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    from multifire.export.onnx import write_onnx

    model, _ = trained(*KINDS[0])
    write_onnx(tmp_path / "net.onnx", model, SIZE, {"recipe": "made"})
    session = onnxruntime.InferenceSession(tmp_path / "net.onnx")
    assert json.loads(session.get_modelmeta().custom_metadata_map["provenance"]) == {"recipe": "made"}
    folded = fold(model).float()
    for frames, samples in ((1, 1), (5, 3)):
        x = torch.randint(0, 3, (frames, samples, 2, *SIZE)).float()
        found = session.run(None, {"x": x.numpy()})[0]
        assert (found.argmax(1) == folded(x).argmax(1).numpy()).all()
    assert str(Path.home()).encode() not in (tmp_path / "net.onnx").read_bytes()


def test_wrong_graph_is_not_written(tmp_path, monkeypatch):
    pytest.importorskip("onnxruntime")
    from multifire.export import onnx as exporter

    model, _ = trained(*KINDS[0])
    monkeypatch.setattr(exporter.OnnxStep, "add", lambda self, a, b, name: a)
    with pytest.raises(ValueError, match="nothing is written"):
        exporter.write_onnx(tmp_path / "net.onnx", model, SIZE, {})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("name", "options"), KINDS)
def test_nir_file_read_back_equals_the_network(name, options, tmp_path):
    pytest.importorskip("nir")
    from multifire.export.nir import from_nir, write_nir

    model, x = trained(name, options)
    write_nir(tmp_path / "net.nir", model, SIZE, {"recipe": "made"})
    torch.testing.assert_close(from_nir(tmp_path / "net.nir")(x), model(x), rtol=0, atol=1e-8)


def test_lif_node_of_nir_equals_a_level_of_the_neuron():
    """The discretisation in the metadata is computed from the parameters of the nodes."""
    pytest.importorskip("nir")
    import nir

    from multifire.export.nir import to_nir

    model, _ = trained(*KINDS[1])
    nodes = [node for name, node in to_nir(model, SIZE).nodes.items() if name.startswith("stem_neuron_level")]
    assert [type(node) for node in nodes] == [nir.LIF, nir.LIF]
    current = torch.randn(20, *nodes[0].tau.shape, dtype=torch.float64)
    spike_sum = torch.zeros_like(current)
    for node in nodes:
        v = np.array(node.v_leak)
        for t, x_t in enumerate(current.numpy()):
            v = v + (node.v_leak - v + node.r * x_t) / node.tau
            spikes = v > node.v_threshold
            v = np.where(spikes, node.v_reset, v)
            spike_sum[t] += torch.from_numpy(spikes)
    assert torch.equal(spike_sum, model.stem.neuron(current))


def _altered(change) -> io.BytesIO:
    import h5py
    import nir

    from multifire.export.nir import to_nir

    content = io.BytesIO()
    nir.write(content, to_nir(trained(*KINDS[0])[0], SIZE))
    with h5py.File(content, "r+") as file:
        change(file)
    return content


def _replace(file, name, value):
    del file[name]
    file[name] = value


NODES = "node/nodes"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: _replace(f, f"{NODES}/stem_conv/weight", np.zeros((4, 2, 3, 3)) * np.nan), "not finite"),
        (lambda f: _replace(f, f"{NODES}/stem_conv/weight", np.zeros((4, 3, 3, 3))), "."),
        (lambda f: f.__delitem__(f"{NODES}/stem_neuron_level1"), "."),
        (lambda f: _replace(f, "node/metadata/multifire", "9"), "version 9"),
        (lambda f: f.__delitem__("node/metadata/multifire"), "another program"),
        (lambda f: _replace(f, "node/metadata/model", '{"name": "ds_resnet600002"}'), "not those of"),
        (lambda f: _replace(f, f"{NODES}/stem_conv/type", "Delay"), "kind 'Delay'"),
        (lambda f: f.__setitem__("node/elsewhere", _link()), "is a link"),
        (lambda f: _replace(f, f"{NODES}/stem_neuron_level0/v_threshold", np.full((4, *SIZE), 0.7)), "v_threshold"),
    ],
)
def test_altered_nir_files_are_refused(change, message, tmp_path):
    pytest.importorskip("nir")
    from multifire.export.nir import from_nir

    path = tmp_path / "net.nir"
    path.write_bytes(_altered(change).getvalue())
    with pytest.raises(ValueError, match=message):
        from_nir(path)


def _link():
    import h5py

    return h5py.ExternalLink("/etc/hostname", "/")


def test_truncated_nir_files_are_refused(tmp_path):
    pytest.importorskip("nir")
    from multifire.export.nir import from_nir

    content = _altered(lambda file: None).getvalue()
    for length in (0, 100, len(content) // 2, len(content) - 50):
        (tmp_path / "cut.nir").write_bytes(content[:length])
        with pytest.raises(ValueError, match=r"cut\.nir"):
            from_nir(tmp_path / "cut.nir")


@pytest.mark.parametrize(("name", "options"), KINDS)
def test_shared_folder_loads_the_same_network(name, options, tmp_path):
    model, x = trained(name, options)
    save_pretrained(model, tmp_path / "net")
    assert torch.equal(from_pretrained(tmp_path / "net")(x), model(x))
    assert "from_pretrained" in (tmp_path / "net" / "README.md").read_text()


def test_other_files_are_never_replaced(tmp_path):
    model, _ = trained(*KINDS[0])
    (tmp_path / "config.json").write_text("of a run")
    with pytest.raises(FileExistsError, match=r"holds another config\.json; choose a new folder"):
        save_pretrained(model, tmp_path)
    assert (tmp_path / "config.json").read_text() == "of a run"
    save_pretrained(model, tmp_path / "net")
    save_pretrained(model, tmp_path / "net")


def test_altered_folders_are_refused(tmp_path):
    model, _ = trained(*KINDS[0])
    save_pretrained(model, tmp_path)
    config, weights = tmp_path / "config.json", tmp_path / "model.safetensors"
    config_text, weight_bytes = config.read_text(), weights.read_bytes()
    for text, message in (
        (config_text.replace('"width": 4', '"width": 400000'), "or more"),
        (config_text.replace('"width": 4', '"width": "4"'), "width"),
        (config_text[:50], "not the configuration"),
        ("[]", "not the configuration"),
    ):
        config.write_text(text)
        with pytest.raises(ValueError, match=message):
            from_pretrained(tmp_path)
    config.write_text(config_text.replace('"decay": 0.25', '"decay": 0.5'))  # all shapes fit
    with pytest.raises(
        ValueError, match=r"config\.json: altered: model\.safetensors contains no digest, or another one"
    ):
        from_pretrained(tmp_path)
    config.write_text(config_text)
    weights.write_bytes(weight_bytes[:-1] + bytes([weight_bytes[-1] ^ 1]))
    with pytest.raises(ValueError, match="digest"):
        from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="save the trained one, not a folded copy"):
        save_pretrained(fold(model), tmp_path / "folded")
    with pytest.raises(FileNotFoundError):
        from_pretrained(tmp_path / "nowhere")


def test_torch_export_equals_the_network():
    for name, options in KINDS[:2]:
        model, x = trained(name, {**options, "backend": "reference"})
        with torch.no_grad():
            program = torch.export.export(fold(model), (x,))
            torch.testing.assert_close(program.module()(x), model(x), rtol=0, atol=1e-8)
