"""The trainer's SGD computes the same as torch's SGD, in every memory layout."""

import pytest
import torch

from multifire.training.optim import SGD

LAST, FIRST = torch.channels_last, torch.contiguous_format


def after_three_steps(make, weight_layout, grad_layout, velocity_layout, momentum: float) -> list[torch.Tensor]:
    """Return weight, bias and their velocities after three steps, all contiguous."""
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(6, 5, 3, 3).contiguous(memory_format=weight_layout))
    bias = torch.nn.Parameter(torch.randn(6))
    optimizer = make([{"params": [weight]}, {"params": [bias], "weight_decay": 0.0}], 0.1, momentum)
    for step in range(3):
        weight.grad = torch.randn(6, 5, 3, 3).contiguous(memory_format=grad_layout)
        bias.grad = torch.randn(6)
        if step == 1 and momentum:  # a checkpoint may have stored it in another layout
            state = optimizer.state[weight]
            state["momentum_buffer"] = state["momentum_buffer"].contiguous(memory_format=velocity_layout)
        optimizer.step()
    velocities = (
        [optimizer.state[p].get("momentum_buffer", torch.zeros(())) for p in (weight, bias)] if momentum else []
    )
    return [x.detach().contiguous() for x in (weight, bias, *velocities)]


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("velocity_layout", [FIRST, LAST])
@pytest.mark.parametrize("grad_layout", [FIRST, LAST])
@pytest.mark.parametrize("weight_layout", [FIRST, LAST])
def test_steps_equal_torchs_in_every_layout(weight_layout, grad_layout, velocity_layout, momentum):
    layouts = (weight_layout, grad_layout, velocity_layout, momentum)
    ours = after_three_steps(lambda groups, lr, m: SGD(groups, lr, m, weight_decay=0.01), *layouts)
    torchs = after_three_steps(lambda groups, lr, m: torch.optim.SGD(groups, lr, m, weight_decay=0.01), *layouts)
    for a, b in zip(ours, torchs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_parameters_without_a_gradient_do_not_change():
    without_grad, with_grad = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(3))
    with_grad.grad = torch.ones(3)
    SGD([without_grad, with_grad], 0.5, 0.9).step()
    assert without_grad.tolist() == [1, 1, 1]
    assert with_grad.tolist() == [0.5, 0.5, 0.5]


def test_a_closure_computes_the_gradients_first():
    weight = torch.nn.Parameter(torch.tensor([3.0]))
    optimizer = SGD([weight], 0.25)

    def loss() -> torch.Tensor:
        value = weight.square().sum()
        value.backward()
        return value

    assert optimizer.step(loss).item() == 9
    assert weight.item() == 1.5
