"""The same call gives the same bits: a result that changes from call to call is a race.

`make test` runs this file under the default OpenMP policy with all threads, as users run, and again with oneDNN limited
to AVX2, whose int8 convolutions had a race that those of AVX-512 did not have.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import multifire as mf
from multifire.config import ModelConfig
from multifire.export import fold, quantise_network
from multifire.nn import model_from_config
from tests.nn.test_modules import settle

WIDTHS = (4, 8, 12, 20, 24, 40)
CALLS = 50
Network = Callable[[Tensor], Tensor]


def trained_step(model: mf.SpikingResNet) -> Network:
    """Logits and all gradients of a training step, in one vector."""
    model.train()

    def step(x: Tensor) -> Tensor:
        model.zero_grad()
        logits = model(x)
        logits.square().sum().backward()
        return torch.cat([logits.flatten(), *(p.grad.flatten() for p in model.parameters() if p.grad is not None)])

    return step


def exported(model: mf.SpikingResNet) -> Network:
    return torch.export.export(model, (batch(),)).module()


def int8(model: mf.SpikingResNet) -> Network:
    return quantise_network(model, mf.nn.config_of_model(model), counts=False)


KINDS: dict[str, Callable[[mf.SpikingResNet], Network]] = {
    "training step": trained_step,
    "evaluation": lambda model: torch.no_grad()(model),
    "folded": fold,
    "int8": int8,
    "exported": exported,
}


def network(width: int) -> mf.SpikingResNet:
    torch.manual_seed(0)
    model = model_from_config(ModelConfig(name="ds_resnet8", in_channels=3, width=width))
    return settle(model).float()


def batch() -> Tensor:
    return torch.randn(2, 8, 3, 20, 20, generator=torch.Generator().manual_seed(0))


def assert_same_bits(call: Network) -> None:
    x = batch()
    first = call(x)
    assert first.isfinite().all()
    different = sum(not torch.equal(call(x), first) for _ in range(CALLS))
    assert different == 0, f"{different} of {CALLS} calls gave another result than the first"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("width", WIDTHS)
def test_every_call_gives_the_same_bits(kind, width):
    assert_same_bits(KINDS[kind](network(width)))


@pytest.mark.parametrize("width", [8, *(pytest.param(width, marks=pytest.mark.slow) for width in WIDTHS if width != 8)])
def test_every_call_of_a_compiled_network_gives_the_same_bits(width):
    torch.compiler.reset()  # another test's shapes would make these symbolic, which torch 2.13 cannot compile
    assert_same_bits(torch.no_grad()(torch.compile(network(width))))
