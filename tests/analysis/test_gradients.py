"""Gradient norms beside autograd's own."""

from functools import partial

import pytest

import multifire as mf
from multifire.analysis import measure_gradients
from multifire.config import OptimConfig
from multifire.nn import ConvFire
from multifire.training.step import sum_of_losses
from tests.analysis.recount import counts, labels, network


def autograd_norms(model, x, y, loss):
    """By backward() and .grad alone."""
    outputs = {}
    layers = {name: module for name, module in model.named_modules() if isinstance(module, ConvFire)}
    for name, layer in layers.items():

        def keep(_layer, _inputs, out, name=name):
            out.retain_grad()
            outputs[name] = out

        layer.register_forward_hook(keep)
    model.train()
    value = loss(model(x, per_step=True), y) / len(y)
    value.backward()
    weights = {name: layers[name].conv.weight.grad.norm().item() for name in outputs}
    activations = {name: out.grad.norm().item() for name, out in outputs.items()}
    return value.item(), weights, activations, model.voting.weight.grad.norm().item()


@pytest.mark.parametrize("optim", [OptimConfig(), OptimConfig(loss="tet", label_smoothing=0.1)])
@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("block", ["ds", "plain"])
def test_equal_to_autograds(block, backend, optim):
    loss = partial(sum_of_losses, optim=optim)
    model = network(block, 3, backend)
    x = counts(model.voting.weight.dtype)
    found = measure_gradients(model, [(x, labels())], loss=loss)
    value, weights, activations, voting = autograd_norms(model, x, labels(), loss)
    assert found.loss == pytest.approx(value, rel=1e-6)
    assert found.names == list(weights)
    assert found.weights == pytest.approx([*weights.values()], rel=1e-5)
    assert found.activations == pytest.approx([*activations.values()], rel=1e-5)
    assert found.voting == pytest.approx(voting, rel=1e-5)
    assert found.weight_ratio == found.weights[-1] / found.weights[0]
    assert found.activation_ratio == found.activations[-1] / found.activations[0]
    assert found.weights[0] > 0


def test_many_batches_are_one_mean_loss():
    """Each batch has its own statistics; the same batch twice has the gradient of one."""
    model, batch = network("ds", 3), (counts(), labels())
    one, two = measure_gradients(model, [batch]), measure_gradients(model, [batch, batch])
    assert two.loss == pytest.approx(one.loss)
    assert two.weights == pytest.approx(one.weights)
    assert two.activations == pytest.approx(one.activations / 2**0.5)  # twice as many, each with half the share


def test_checkpointed_stages_and_frozen_weights():
    model = network("ds", 3)
    want = measure_gradients(model, [(counts(), labels())])
    for frozen in model.parameters():
        frozen.requires_grad_(False)
    model.checkpoint_stages = True
    found = measure_gradients(model, [(counts(), labels())])
    assert found.names == want.names
    assert found.weights == pytest.approx(want.weights)
    assert found.activations == pytest.approx(want.activations)
    assert not any(p.requires_grad for p in model.parameters())


def test_no_gradient_has_no_ratio():
    model = network("plain", 1)
    model.voting.weight.data.zero_()
    record = mf.analysis.analyze(model, [(counts(), labels())]).record()
    assert record["gradient"]["weight_ratio"] is None
    assert record["layers"][0]["weight_grad_norm"] == 0
