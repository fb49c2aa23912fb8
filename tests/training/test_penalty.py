"""The spike penalty counts what the analysis counts, and its gradient is the fan-out; training with it fires less."""

import pytest
import torch
from torch import nn

import multifire as mf
from multifire.analysis import measure_energy
from multifire.config import RunConfig
from multifire.training.loop import train
from multifire.training.own import Own
from multifire.training.penalty import count_spikes, reading_spikes
from multifire.training.step import forward_backward
from tests.test_train import TINY, override


def batch(channels: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return torch.rand(3, 2, channels, 12, 10), torch.tensor([1, 0])


@pytest.mark.parametrize("name", ["ds_resnet8", "plain_resnet14", "ms_resnet8", "vgg9"])
@pytest.mark.parametrize("signed", [False, True])
def test_operations_are_those_of_the_analysis(name, signed):
    model = mf.build_model(name, width=4, signed=signed).train()
    x, y = batch()
    with count_spikes(model) as counter:
        model(x)
    synops = measure_energy(model, [(x, y)]).synops
    assert 1e6 * counter.millions().item() / 2 == pytest.approx(synops, rel=1e-5)
    assert synops > 0


@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last])
def test_the_gradient_of_an_input_is_its_fan_out(order):
    model = mf.build_model("ds_resnet8", width=4).train()
    conv = reading_spikes(model)[0]
    spikes = torch.ones(2, 4, 6, 6).contiguous(memory_format=order).requires_grad_()
    with count_spikes(model) as counter:
        conv(spikes)
    (grad,) = torch.autograd.grad(counter.millions(), spikes)
    assert grad[0, 0, 0, 0].item() == pytest.approx(4e-6 * 4)  # a corner is read at four places by four channels
    assert grad[0, 0, 2, 2].item() == pytest.approx(9e-6 * 4)
    assert torch.equal(grad[0, 0], grad[0, 3])


@pytest.mark.parametrize("checkpoint_stages", [False, True])
def test_the_step_adds_the_penalty_to_the_gradient_and_not_to_the_loss(checkpoint_stages):
    x, y = batch()

    def gradients(penalty: float, expected: bool = False) -> tuple[float, list[torch.Tensor]]:
        torch.manual_seed(1)
        model = mf.build_model("ds_resnet8", width=4, checkpoint_stages=checkpoint_stages)
        cfg = override(RunConfig(), optim={"spike_penalty": penalty})
        totals = forward_backward(model, x, y, cfg, 1.0)
        if expected:
            model.train()
            with count_spikes(model) as counter:
                model(x)
                (2.5 * counter.millions()).backward()
        return totals[0].item(), [p.grad for p in model.parameters()]

    loss, grads = gradients(2.5)
    plain_loss, plain_grads = gradients(0.0)
    _, wanted = gradients(0.0, expected=True)
    assert loss == plain_loss
    assert any(not torch.allclose(a, b) for a, b in zip(grads, plain_grads, strict=True))
    for grad, want in zip(grads, wanted, strict=True):
        torch.testing.assert_close(grad, want, rtol=1e-4, atol=1e-6)


def test_training_with_a_penalty_ends_with_fewer_operations(tmp_path):
    cfg = override(TINY, optim={"epochs": 2})
    synops = {}
    for penalty in (0.0, 30.0):
        run = tmp_path / str(penalty)
        train(override(cfg, optim={"spike_penalty": penalty}), run)
        synops[penalty] = mf.Run(run).headline["energy"]["synops"]
    assert synops[30.0] < 0.8 * synops[0.0]


def test_it_needs_a_network_whose_layers_are_known(tmp_path):
    class Other(nn.Module):
        def __init__(self):
            super().__init__()
            self.readout = nn.Linear(28, 10)

        def forward(self, x):
            return self.readout(x.mean((2, 3)))

    cfg = override(TINY, optim={"spike_penalty": 1.0})
    with pytest.raises(ValueError, match=r"optim.spike_penalty needs one of multifire's networks"):
        train(cfg, tmp_path / "run", own=Own(network=Other()))
    with pytest.raises(ValueError, match=r"optim.spike_penalty is -1, expected at least 0"):
        override(cfg, optim={"spike_penalty": -1})
