"""Blocks and the whole network equal the authors' code in float64, where no spike flips by rounding."""

import copy

import pytest
import torch
import torch.nn.functional as F

import multifire as mf
from multifire.export.reference_checkpoint import to_reference_state_dict

EXACT = {"rtol": 1e-8, "atol": 1e-8}
BLOCKS = {"ds": mf.nn.DSBlock, "plain": mf.nn.PlainBlock}
# The authors' name of each part of a block, and our name.
PARTS = [
    ("conv1.", "fire1.conv."),
    ("conv2.", "fire2.conv."),
    ("bn1.bn.", "fire1.norm."),
    ("bn2.bn.", "fire2.norm."),
    ("shortcut.0.", "shortcut.conv."),
    ("shortcut.1.bn.", "shortcut.norm."),
]


def our_name(name: str) -> str:
    for theirs, ours in PARTS:
        name = name.replace(theirs, ours) if name.startswith(theirs) else name
    return name


@pytest.mark.parametrize("kind", BLOCKS)
@pytest.mark.parametrize(("in_channels", "out_channels", "stride"), [(6, 6, 1), (6, 10, 2)])
def test_block_equals_the_authors_code(golden, kind, in_channels, out_channels, stride):
    prefix = f"{kind}_{in_channels}_{out_channels}_{stride}/"
    arrays = {key.removeprefix(prefix): value for key, value in golden("block").items() if key.startswith(prefix)}
    block = BLOCKS[kind](in_channels, out_channels, stride).double()
    weights = {our_name(key[3:]): value for key, value in arrays.items() if key.startswith("sd/")}
    block.load_state_dict({name: value for name, value in weights.items() if "num_batches" not in name})
    with torch.no_grad():
        evaluated = copy.deepcopy(block).eval()(arrays["x"].unflatten(0, (4, -1)))
    torch.testing.assert_close(evaluated.flatten(0, 1), arrays["eval_out"], **EXACT)

    x = arrays["x"].unflatten(0, (4, -1)).requires_grad_()
    out = block(x)
    out.backward(arrays["grad_out"].unflatten(0, (4, -1)))
    torch.testing.assert_close(out.flatten(0, 1), arrays["out"], **EXACT)
    torch.testing.assert_close(x.grad.flatten(0, 1), arrays["grad_x"], **EXACT)
    grads = {our_name(key[5:]): value for key, value in arrays.items() if key.startswith("grad/")}
    assert grads.keys() == dict(block.named_parameters()).keys()
    for name, parameter in block.named_parameters():
        torch.testing.assert_close(parameter.grad, grads[name], **EXACT)


@pytest.fixture(scope="module")
def gesture(golden, gesture_checkpoint):
    arrays = golden("gesture_ds_resnet20")
    return arrays["x"].double(), arrays["y"], arrays, lambda: mf.load_reference_checkpoint(gesture_checkpoint).double()


def test_network_in_evaluation_equals_the_authors_code(gesture):
    x, _, arrays, load = gesture
    with torch.no_grad():
        torch.testing.assert_close(load().eval()(x), arrays["eval_logits"], **EXACT)


def test_network_in_training_equals_the_authors_code(gesture, gesture_parameter_names):
    x, y, arrays, load = gesture
    model = load()
    logits = model(x)
    loss = F.cross_entropy(logits, y)
    loss.backward()
    torch.testing.assert_close(logits, arrays["train_logits"], **EXACT)
    assert loss.item() == pytest.approx(arrays["loss"].item(), abs=1e-8)
    # With the gradients stored in place of the weights, the conversion gives them the authors' names.
    model.load_state_dict(model.state_dict() | {name: p.grad for name, p in model.named_parameters()})
    theirs = to_reference_state_dict(model)
    for name, norm in zip(gesture_parameter_names, arrays["grad_norm"].tolist(), strict=True):
        assert theirs[name].norm().item() == pytest.approx(norm, rel=1e-8), name
    torch.testing.assert_close(theirs["conv1.weight"], arrays["grad_conv1"], **EXACT)


def test_losses_of_three_sgd_steps_equal_the_authors_code(gesture):
    x, y, arrays, load = gesture
    model = load()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, 0.9, weight_decay=1e-4)
    for expected in arrays["sgd_losses"].tolist():
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        assert loss.item() == pytest.approx(expected, abs=1e-8)
