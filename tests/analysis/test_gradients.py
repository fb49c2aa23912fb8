"""Gradient norms equal those that autograd gives."""

from functools import partial

import numpy as np
import pytest
import torch

import multifire as mf
from multifire.analysis import measure_gradients
from multifire.analysis.gradients import mean_cross_entropy
from multifire.config import OptimConfig
from multifire.nn import ConvFire
from multifire.training.step import sum_of_losses
from tests.analysis.recount import event_frames, labels, network


def autograd_norms(model, x, y, loss):
    """Compute the norms with backward() and .grad only."""
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
def test_norms_equal_those_of_autograd(block, backend, optim):
    loss = partial(sum_of_losses, optim=optim)
    model = network(block, 3, backend)
    x = event_frames(model.voting.weight.dtype)
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


def test_batches_are_combined_into_one_mean_loss():
    """Each batch has its own statistics, so the same batch twice has the gradient of one."""
    model, batch = network("ds", 3), (event_frames(), labels())
    one, two = measure_gradients(model, [batch]), measure_gradients(model, [batch, batch])
    assert two.loss == pytest.approx(one.loss)
    assert two.weights == pytest.approx(one.weights)
    assert two.activations == pytest.approx(one.activations / 2**0.5)  # twice as many values, each half as large


def test_checkpointed_stages_and_frozen_weights_do_not_change_the_norms():
    model = network("ds", 3)
    want = measure_gradients(model, [(event_frames(), labels())])
    for frozen in model.parameters():
        frozen.requires_grad_(False)
    model.checkpoint_stages = True
    found = measure_gradients(model, [(event_frames(), labels())])
    assert found.names == want.names
    assert found.weights == pytest.approx(want.weights)
    assert found.activations == pytest.approx(want.activations)
    assert not any(p.requires_grad for p in model.parameters())


def test_neurons_without_a_convolution_are_measured():
    """In a membrane-shortcut network the first neurons of a block, and the last of the network, stand alone."""
    model = network("ms", 2)
    batch = (event_frames(), labels())
    found = mf.analysis.analyze(model, [batch])
    alone = {"stages.0.0.fire1", "stages.1.0.fire1", "stages.2.0.fire1", "last"}
    outputs = {}
    for name in alone:
        model.get_submodule(name).register_forward_hook(lambda _n, _x, out, name=name: outputs.update({name: out}))
    loss = mean_cross_entropy(model.train()(batch[0], per_step=True), labels()) / 2
    grads = dict(zip(outputs, torch.autograd.grad(loss, list(outputs.values())), strict=True))
    layers = {layer["name"]: layer for layer in found.record()["layers"]}
    assert list(layers)[-1] == "last"
    for name in alone:
        assert layers[name]["weight_grad_norm"] is None
        assert layers[name]["activation_grad_norm"] == pytest.approx(grads[name].norm().item(), rel=1e-5)
        assert np.any(layers[name]["rate"])
    assert found.gradients.weight_ratio > 0


def test_gradient_of_zero_has_no_ratio():
    model = network("plain", 1)
    model.voting.weight.data.zero_()
    record = mf.analysis.analyze(model, [(event_frames(), labels())]).record()
    assert record["gradient"]["weight_ratio"] is None
    assert record["layers"][0]["weight_grad_norm"] == 0
