"""A folded network computes what the network computes in evaluation."""

import pytest
import torch

import multifire as mf
from tests.nn.test_modules import frames, settle

EXACT = {"rtol": 1e-8, "atol": 1e-8}


def network(name: str = "ds_resnet14", **options) -> mf.SpikingResNet:
    torch.manual_seed(0)
    net = settle(mf.build_model(name, in_channels=2, width=4, **options))
    for norm in net.modules():
        if isinstance(norm, mf.nn.TdBatchNorm2d) and norm.weight is not None:
            torch.nn.init.uniform_(norm.weight, 0.5, 1.5)
            torch.nn.init.uniform_(norm.bias, -0.5, 0.5)
    return net


@pytest.mark.parametrize("norm_input", [False, True])
@pytest.mark.parametrize("name", ["ds_resnet14", "plain_resnet14"])
def test_folded_network_equals_the_network(name, norm_input):
    net = network(name, norm_input=norm_input)
    folded, x = mf.export.fold(net), frames(2)
    with torch.no_grad():
        expected = net(x, per_step=True)
    assert expected.std() > 0.01
    torch.testing.assert_close(folded(x, per_step=True), expected, **EXACT)
    state = None
    for t, frame in enumerate(x, 1):
        logits, state = folded.step(frame, state)
        torch.testing.assert_close(logits, expected[:t].mean(0), **EXACT)


def test_static_image():
    net = network()
    image = frames(2)[:1].expand(4, -1, -1, -1, -1)
    torch.testing.assert_close(mf.export.fold(net)(image), net(image).detach(), **EXACT)


def test_authors_checkpoint(golden, gesture_checkpoint):
    expected = golden("gesture_ds_resnet20")
    net = mf.load_reference_checkpoint(gesture_checkpoint).double()
    with torch.no_grad():
        logits = mf.export.fold(net)(expected["x"])
    torch.testing.assert_close(logits, expected["eval_logits"], **EXACT)


def test_folded_network_has_no_norms():
    folded = mf.export.fold(network("plain_resnet8", norm_input=True))
    kinds = {type(module) for module in folded.modules() if not list(module.children())}
    assert kinds == {mf.nn.SpikeConv2d, mf.nn.MLF, mf.export.Shift, torch.nn.Linear, torch.nn.Identity}
    assert not any(parameter.requires_grad for parameter in folded.parameters())


def test_fold_does_not_change_the_network():
    net = network().train()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    mf.export.fold(net)
    assert net.training
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())


def test_folding_twice_is_refused():
    with pytest.raises(ValueError, match="no norm to fold"):
        mf.export.fold(mf.export.fold(network()))
