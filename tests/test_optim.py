"""The trainer's SGD against torch's own, one tensor at a time."""

import pytest
import torch

from multifire.training.optim import SGD

LAST, FIRST = torch.channels_last, torch.contiguous_format


def stepped(optimizer_of, weight_order, grad_order, velocity_order, momentum: float) -> list[torch.Tensor]:
    """Weight, bias and their velocities after three steps, in one order."""
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(6, 5, 3, 3).contiguous(memory_format=weight_order))
    bias = torch.nn.Parameter(torch.randn(6))
    optimizer = optimizer_of([{"params": [weight]}, {"params": [bias], "weight_decay": 0.0}], 0.1, momentum)
    for step in range(3):
        weight.grad = torch.randn(6, 5, 3, 3).contiguous(memory_format=grad_order)
        bias.grad = torch.randn(6)
        if step == 1 and momentum:  # as a checkpoint may bring it
            state = optimizer.state[weight]
            state["momentum_buffer"] = state["momentum_buffer"].contiguous(memory_format=velocity_order)
        optimizer.step()
    velocities = (
        [optimizer.state[p].get("momentum_buffer", torch.zeros(())) for p in (weight, bias)] if momentum else []
    )
    return [x.detach().contiguous() for x in (weight, bias, *velocities)]


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("velocity_order", [FIRST, LAST])
@pytest.mark.parametrize("grad_order", [FIRST, LAST])
@pytest.mark.parametrize("weight_order", [FIRST, LAST])
def test_steps_as_torch_does_in_every_order(weight_order, grad_order, velocity_order, momentum):
    orders = (weight_order, grad_order, velocity_order, momentum)
    own = stepped(lambda groups, lr, m: SGD(groups, lr, m, weight_decay=0.01), *orders)
    torchs = stepped(lambda groups, lr, m: torch.optim.SGD(groups, lr, m, weight_decay=0.01), *orders)
    for a, b in zip(own, torchs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_parameters_without_a_gradient_stay():
    still, moved = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(3))
    moved.grad = torch.ones(3)
    SGD([still, moved], 0.5, 0.9).step()
    assert still.tolist() == [1, 1, 1]
    assert moved.tolist() == [0.5, 0.5, 0.5]


def test_a_closure_computes_the_gradients_first():
    weight = torch.nn.Parameter(torch.tensor([3.0]))
    optimizer = SGD([weight], 0.25)

    def loss() -> torch.Tensor:
        value = weight.square().sum()
        value.backward()
        return value

    assert optimizer.step(loss).item() == 9
    assert weight.item() == 1.5
