"""Networks of the neuron's other members and with learned numbers: building, streaming, measuring, exporting."""

import dataclasses
import json

import numpy as np
import pytest
import torch

import multifire as mf
from multifire.analysis import analyze, measure_activity, measure_energy
from multifire.config import ModelConfig, RunConfig, json_format
from multifire.config.parameters import count_parameters
from multifire.export import fold
from multifire.export.int8 import Int8MLF, load_int8, quantise_network, save_int8
from multifire.nn import MLF, ConvFire, config_of_model, model_from_config
from multifire.nn.block import convolve

HALVES = (0.5, 1.5, 2.5)
OTHERS = {
    "subtract": {"reset": "subtract"},
    "MSF": {"membranes": "shared", "reset": "any"},
    "I-LIF": {"membranes": "shared", "reset": "subtract", "thresholds": HALVES},
    "ternary": {"levels": 1, "thresholds": (0.5,), "signed": True},
    "signed": {"membranes": "shared", "reset": "any", "thresholds": HALVES, "signed": True},
}
LEARNED = {"learn_thresholds": True, "learn_decay": True}
FAMILY = {**OTHERS, "learned": LEARNED, "learned I-LIF": {**OTHERS["I-LIF"], **LEARNED}}
SIZE = (8, 8)

family = pytest.mark.parametrize("options", FAMILY.values(), ids=FAMILY)
others = pytest.mark.parametrize("options", OTHERS.values(), ids=OTHERS)


def trained(options: dict, name: str = "ds_resnet8", dtype: torch.dtype = torch.float64) -> mf.SpikingResNet:
    """Return a network in evaluation mode whose norms, biases and learned numbers are not at their initial values."""
    torch.manual_seed(0)
    model = mf.build_model(name, in_channels=2, width=4, **options).to(dtype)
    for _ in range(3):
        model(torch.randn(3, 4, 2, *SIZE, dtype=dtype))
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model.eval()


def frames(dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randint(0, 4, (4, 3, 2, *SIZE), generator=torch.Generator().manual_seed(1)).to(dtype)


@family
@pytest.mark.parametrize("name", ["ds_resnet8", "plain_resnet8"])
def test_steps_equal_one_call_and_every_parameter_has_a_gradient(name, options):
    model, x = trained(options, name), frames()
    state = None
    for frame in x:
        logits, state = model.step(frame, state)
    torch.testing.assert_close(logits, model(x), rtol=1e-10, atol=1e-10)
    model.train()(x).square().sum().backward()
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert parameter.grad.isfinite().all()
    learned = [p for n, p in model.named_parameters() if n.endswith(("raw_thresholds", "raw_decay"))]
    assert len(learned) == 2 * 9 * (name == "ds_resnet8") + 2 * 7 * (name == "plain_resnet8") or not learned
    assert all(parameter.grad.abs().max() > 0 for parameter in learned)


@family
@pytest.mark.parametrize("name", ["ds_resnet14", "plain_resnet8", "ms_resnet8", "sew_resnet8", "vgg9"])
def test_configuration_describes_the_network(name, options):
    model = mf.build_model(name, in_channels=2, width=4, **options)
    cfg = config_of_model(model)
    for field, value in options.items():
        assert getattr(cfg, field) == value
    again = model_from_config(json_format.from_json(json_format.to_json(RunConfig(model=cfg)), "config.json").model)
    again.load_state_dict(model.state_dict())
    assert config_of_model(again) == cfg
    assert count_parameters(cfg) == sum(parameter.numel() for parameter in model.parameters())


def test_configuration_written_before_the_family_is_read_as_the_paper_s_neuron():
    values = json.loads(json_format.to_json(RunConfig()))
    for name in ("learn_thresholds", "learn_decay", "membranes", "reset", "signed"):
        del values["model"][name]
    assert json_format.from_json(json.dumps(values), "config.json") == RunConfig()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"membranes": "shared"}, "take reset='any'"),
        ({"reset": "any"}, "take reset='zero'"),
        ({"thresholds": (1.0, 0.5, 2.0), "learn_thresholds": True}, "expected ascending ones above 0"),
        ({"decay": 1.0, "learn_decay": True}, "expected 0 < decay < 1"),
        ({"surrogate": "bell"}, "unknown surrogate 'bell'.*import the code that registers it first"),
    ],
)
def test_configuration_of_no_neuron_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        RunConfig(model=ModelConfig(**options))
    with pytest.raises(ValueError, match=message):
        mf.build_model("ds_resnet8", width=2, **options)


@family
@pytest.mark.parametrize("block", ["ds", "plain"])
def test_rates_equal_those_of_the_layers_outputs(block, options):
    """`measure_activity` simulates the membranes itself."""
    model, batch = trained(options, f"{block}_resnet8"), (frames(), torch.zeros(3))
    outputs: dict[str, torch.Tensor] = {}

    def keep(name: str):
        def hook(layer: ConvFire, inputs: tuple, kwargs: dict, out: torch.Tensor) -> None:
            after = kwargs.get("add_after")
            outputs[name] = out if after is None else out - after

        return hook

    for name, module in model.named_modules():
        if isinstance(module, ConvFire):
            module.register_forward_hook(keep(name), with_kwargs=True)
    activity = measure_activity(model, [batch])
    for layer in activity.layers:
        spikes = outputs[layer.name].abs().mean((1, 2, 3, 4)).numpy()  # a membrane fires in one direction at a time
        np.testing.assert_allclose(layer.rate.sum(0), spikes, atol=1e-12)
        neuron = model.get_submodule(layer.name).neuron
        assert layer.thresholds == neuron.thresholds
        assert layer.decay == neuron.decay


@pytest.mark.parametrize("name", ["rect", "triangle", "sigmoid", "gaussian"])
@family
def test_dormant_units_are_those_without_a_gradient(options, name):
    """The gradient of a weighted sum of one layer's spikes is 0 where, and only where, a unit is dormant."""
    has_window = name in ("rect", "triangle")
    model, x = trained({**options, "surrogate": name, "surrogate_width": 0.3 if has_window else 1.0}), frames()
    dormant = measure_activity(model, [(x, torch.zeros(3))]).layers[0].dormant
    with torch.no_grad():
        y = model.stem.norm(convolve(model.stem.conv, x))
    spikes = model.stem.neuron(y.requires_grad_())
    weights = torch.rand(spikes.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    (grad,) = torch.autograd.grad((spikes * weights).sum(), y)
    assert dormant == pytest.approx((grad == 0).all(0).double().mean().item(), abs=1e-12)
    assert (dormant > 0) == has_window


@family
def test_analysis_records_the_neuron(options):
    model = trained(options)
    record = analyze(model, [(frames(), torch.tensor([0, 1, 2]))]).record()
    assert record == json.loads(json.dumps(record, allow_nan=False))
    assert record["neuron"]["thresholds"] == list(model.stem.neuron.thresholds)
    assert record["neuron"]["reset"] == options.get("reset", "zero")
    assert record["layers"][-1]["thresholds"] == list(model.stages[-1][-1].fire2.neuron.thresholds)


def test_negative_spikes_cost_as_much_as_positive_ones():
    model, batch = trained(OTHERS["ternary"]), (frames(), torch.zeros(3))
    inputs = {}
    conv = model.stages[0][0].fire2.conv
    conv.register_forward_hook(lambda _conv, args, _out: inputs.update(x=args[0]))
    energy = measure_energy(model, [batch])
    assert inputs["x"].min() == -1
    found = next(c for c in energy.connections if c.name == "stages.0.0.fire2.conv")
    ones = torch.ones(1, 1, *SIZE, dtype=torch.float64)
    fan_out = 4 * torch.nn.functional.conv2d(ones, torch.ones(1, 1, 3, 3, dtype=torch.float64), padding=1)
    assert found.macs == 0
    assert found.synops == pytest.approx((inputs["x"].abs() * fan_out).sum().item() / 3)
    assert energy.bits == 2


@family
@pytest.mark.parametrize("name", ["ds_resnet8", "plain_resnet8"])
def test_folded_network_computes_the_same(name, options):
    model, x = trained(options, name), frames()
    torch.testing.assert_close(fold(model)(x), model(x), rtol=1e-9, atol=1e-9)


@family
@pytest.mark.parametrize("step", [False, True])
def test_onnx_graph_equals_the_network(options, step):
    pytest.importorskip("onnxruntime")
    from onnx.reference import ReferenceEvaluator

    from multifire.export.onnx import onnx_graph, run_frames

    model, x = trained(options), frames()
    graph = onnx_graph(fold(model), SIZE, step=step, dtype=np.float64)
    found = run_frames(ReferenceEvaluator(graph).run, graph, x.numpy(), step)
    np.testing.assert_allclose(found, model(x).detach().numpy(), atol=1e-8)


@family
def test_onnx_file_passes_its_own_check(tmp_path, options):
    pytest.importorskip("onnxruntime")
    from multifire.export.onnx import write_onnx

    write_onnx(tmp_path / "net.onnx", trained(options, dtype=torch.float32), SIZE, {})
    assert (tmp_path / "net.onnx").stat().st_size > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nir_file_has_the_learned_numbers(tmp_path, dtype):
    pytest.importorskip("nir")
    from multifire.export.nir import from_nir, to_nir, write_nir

    model, x = trained(LEARNED, dtype=dtype), frames(dtype)
    write_nir(tmp_path / "net.nir", model, SIZE, {})
    again = from_nir(tmp_path / "net.nir")
    neurons = [module for module in again.modules() if isinstance(module, MLF)]
    assert {neuron.thresholds for neuron in neurons} == {m.thresholds for m in model.modules() if isinstance(m, MLF)}
    assert len({neuron.decay for neuron in neurons}) == 9
    assert torch.equal(again(x), fold(model)(x))
    graph = to_nir(model, SIZE)
    for wrong in ("[]", "{}", '{"stem.neuron": [[1], 2]}', json.dumps(dict.fromkeys(["stem.neuron"], 3))):
        graph.metadata["neurons"] = wrong
        with pytest.raises(ValueError, match="no valid learned thresholds and decays"):
            from_nir(graph)


@others
def test_nir_refuses_what_it_cannot_express(options):
    model = trained(options, dtype=torch.float32)
    found = ", ".join(
        f"{name}={value!r}" for name, value in options.items() if name in ("membranes", "reset", "signed")
    )
    with pytest.raises(ValueError, match=f"the authors' code knows the MLF neuron alone, found {found}"):
        mf.to_reference_state_dict(model)
    pytest.importorskip("nir")
    from multifire.export.nir import to_nir

    with pytest.raises(ValueError, match=f"a LIF of NIR knows the MLF neuron alone, found {found}"):
        to_nir(model, SIZE)


def test_learned_numbers_are_no_part_of_the_authors_networks():
    with pytest.raises(ValueError, match="learned thresholds"):
        mf.to_reference_state_dict(mf.build_model("ds_resnet8", width=2, **LEARNED))


@family
def test_int8_network_fires_as_the_neurons_do(options):
    """Weights that are integers times a scale lose nothing, so the logits are the network's."""
    model, x = trained(options, dtype=torch.float32), frames(torch.float32)
    if options.get("signed"):
        with pytest.raises(ValueError, match=r"int8 has activations .*found signed=True"):
            quantise_network(model, config_of_model(model), counts=True)
        return
    network = quantise_network(model, config_of_model(model), counts=True)
    exact = fold(model)
    for name, layer in network.network.named_modules():
        if isinstance(layer, Int8MLF):
            conv = exact.get_submodule(f"{name}.conv")
            conv.weight.data = layer.conv.weight.float() * layer.scale.view(-1, 1, 1, 1)
    torch.testing.assert_close(network(x), exact(x), rtol=1e-3, atol=1e-3)
    assert exact(x).std() > 0
    state = None
    for frame in x:
        logits, state = network.step(frame, state)
    torch.testing.assert_close(logits, network(x), rtol=1e-5, atol=1e-5)


def test_int8_file_has_the_learned_numbers(tmp_path, monkeypatch):
    monkeypatch.setattr("multifire.export.int8.read_provenance", lambda text, source: {})
    model, x = trained(LEARNED, dtype=torch.float32), frames(torch.float32)
    network = quantise_network(model, config_of_model(model), counts=True)
    layers = [name for name, module in model.named_modules() if isinstance(module, ConvFire)]
    for name in layers:
        assert network.network.get_submodule(name).neuron.thresholds == model.get_submodule(name).neuron.thresholds
    save_int8(tmp_path / "net.safetensors", network, {})
    again = load_int8(tmp_path / "net.safetensors")
    assert torch.equal(again(x), network(x))
    constant = model_from_config(dataclasses.replace(config_of_model(model), learn_thresholds=False, learn_decay=False))
    assert again.network.stem.neuron.thresholds != constant.stem.neuron.thresholds


@family
def test_shared_folder_has_the_whole_network(tmp_path, options):
    model, x = trained(options, dtype=torch.float32), frames(torch.float32)
    mf.save_pretrained(model, tmp_path / "net")
    assert torch.equal(mf.from_pretrained(tmp_path / "net")(x), model(x))
