"""Dormant units, rates and membranes equal a count neuron by neuron, and measuring does not change the network."""

import numpy as np
import pytest
import torch

import multifire as mf
from multifire.analysis import measure_activity, measure_energy, measure_gradients
from multifire.nn import ConvFire
from multifire.ops import cpu
from tests.analysis.recount import NaiveNetwork, T, event_frames, labels, network

BACKENDS = ["reference", pytest.param("cpu", marks=pytest.mark.skipif(not cpu.is_built(), reason=cpu.NOT_BUILT))]


def assert_equals_naive_count(model, x, found):
    naive = NaiveNetwork(model, x)
    assert [layer.name for layer in found.layers] == list(naive.dormant)
    for layer in found.layers:
        assert layer.dormant == naive.dormant[layer.name]
        np.testing.assert_array_equal(layer.rate, naive.rate[layer.name])
        bins = np.linspace(layer.membranes.low, layer.membranes.high, layer.membranes.counts.shape[1] + 1)
        for k, membranes in enumerate(np.array(naive.membranes[layer.name])):
            # A membrane within rounding of a bin's edge may lie on either side of it.
            close = np.abs(membranes[:, None] - bins).min(1) < 1e-5
            counted = np.histogram(membranes, bins)[0]
            assert np.abs(layer.membranes.counts[k] - counted).sum() <= 2 * close.sum()
            assert abs(layer.membranes.below[k] - (membranes < bins[0]).sum()) <= close.sum()
            assert abs(layer.membranes.above[k] - (membranes > bins[-1]).sum()) <= close.sum()
    neurons = [layer.neurons for layer in found.layers]
    assert found.dormant == pytest.approx(np.average([*naive.dormant.values()], weights=neurons))
    return naive


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("levels", [1, 2, 3])
@pytest.mark.parametrize("block", ["ds", "plain"])
def test_activity_equals_a_count_neuron_by_neuron(block, levels, training, backend):
    model = network(block, levels, backend).train(training)
    x = event_frames(model.voting.weight.dtype)
    found = measure_activity(model, [(x, labels())])
    naive = assert_equals_naive_count(model, x, found)
    assert found.samples == 2
    assert found.layers[0].shape == (2, 5, 5)
    with torch.no_grad():
        np.testing.assert_allclose(model(x).numpy(), expected_logits(model, naive.out), rtol=1e-5, atol=1e-5)
    assert 0 < found.dormant < 1
    assert any(layer.rate.any() for layer in found.layers)


def expected_logits(model, out):
    """Return the logits that the voting layer must compute from the output of the naive network."""
    weight, bias = model.voting.weight.detach().numpy(), model.voting.bias.detach().numpy()
    return (out.mean((3, 4)) @ weight.T + bias).mean(0)


@pytest.mark.parametrize("surrogate", ["triangle", "atan"])
def test_dormant_units_are_those_of_the_networks_surrogate(surrogate):
    model = network("ds", 2, surrogate=surrogate, surrogate_width=0.5).eval()
    found = measure_activity(model, [(event_frames(), labels())])
    assert_equals_naive_count(model, event_frames(), found)
    assert (found.dormant == 0) == (surrogate == "atan")


def test_static_image_is_measured_at_every_time_step():
    model = network("ds", 3).eval()
    static = torch.rand(1, 2, 2, 5, 5, dtype=torch.float64).expand(T, 2, 2, 5, 5)
    found = measure_activity(model, [(static, labels())])
    assert_equals_naive_count(model, static, found)
    assert found.layers[0].rate.shape == (3, T)


def test_division_into_batches_does_not_change_the_result(monkeypatch):
    model, x = network("plain", 3).eval(), event_frames()
    whole = measure_activity(model, [(x, labels())])
    monkeypatch.setattr("multifire.analysis.activity.CHUNK_NEURONS", 1)
    parts = measure_activity(model, [(x[:, :1], labels()[:1]), (x[:, 1:], labels()[1:])])
    assert parts.samples == whole.samples
    for part, layer in zip(parts.layers, whole.layers, strict=True):
        assert part.dormant == layer.dormant
        np.testing.assert_array_equal(part.rate, layer.rate)
        np.testing.assert_array_equal(part.membranes.counts, layer.membranes.counts)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_rates_of_the_levels_add_up_to_the_output_of_the_fused_layer(precision):
    """This network is of realistic size."""
    torch.manual_seed(0)
    model = mf.build_model("plain_resnet8", width=8)
    x = torch.randn(4, 4, 3, 16, 16)
    outputs = {}
    for name, layer in model.named_modules():
        if isinstance(layer, ConvFire):
            layer.register_forward_hook(lambda _layer, _x, out, name=name: outputs.update({name: out.detach()}))
    found = measure_activity(model, [(x, torch.zeros(4))], precision=precision)
    for layer in found.layers:
        # Rounding may flip about one spike in a million; here a layer has at most about 30,000.
        assert layer.rate.sum(0) == pytest.approx(outputs[layer.name].double().mean((1, 2, 3, 4)).numpy(), abs=2e-4)


@pytest.mark.parametrize("measure", [measure_activity, measure_energy, measure_gradients, mf.analysis.analyze])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("block", ["ds", "plain"])
def test_measuring_does_not_change_the_network(measure, training, block):
    def outcome(measured: bool):
        torch.manual_seed(1)
        model = mf.build_model(f"{block}_resnet8", in_channels=2, num_classes=3, width=4).train(training)
        model.stages[0].eval()  # pyright: ignore[reportCallIssue] - one stage is in another mode
        x = event_frames(torch.float32)
        model(x).square().sum().backward()
        hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
        if measured:
            measure(model, [(x, labels()), (x, labels())])
        assert hooks == [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
        modes = [module.training for module in model.modules()]
        state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        grads = [p.grad.clone() for p in model.parameters()]
        out = model(x)
        out.square().sum().backward()
        after = [p.grad.clone() for p in model.parameters()]
        requires_grad = [p.requires_grad for p in model.parameters()]
        return modes, requires_grad, [*state.values(), *grads, out, *after, torch.get_rng_state()]

    modes, requires_grad, tensors = outcome(measured=True)
    expected_modes, expected_requires_grad, expected_tensors = outcome(measured=False)
    assert modes == expected_modes
    assert requires_grad == expected_requires_grad
    assert all(torch.equal(a, b) for a, b in zip(tensors, expected_tensors, strict=True))


@pytest.mark.parametrize("measure", [measure_activity, measure_energy, measure_gradients, mf.analysis.analyze])
def test_no_batch_is_an_error(measure):
    with pytest.raises(ValueError, match="no sample to measure on"):
        measure(network("ds", 1), [])


def test_nan_is_an_error_that_names_the_layer():
    model = network("ds", 1).eval()
    model.stages[1][0].fire1.conv.weight.data.fill_(torch.nan)
    with pytest.raises(FloatingPointError, match=r"stages\.1\.0\.fire1's neurons is NaN"):
        measure_activity(model, [(event_frames(), labels())])
