"""The network on a GPU: compared with the reference, compiled, and trained."""

import copy
from collections.abc import Iterable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import multifire as mf
from multifire.config import get_recipe
from multifire.nn import model_from_config
from multifire.ops import triton
from multifire.training.optim import make_optimizer
from multifire.training.step import train_step

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
CUDA = torch.device("cuda")


@pytest.fixture(autouse=True)
def no_tf32(monkeypatch):
    """With TF32 a convolution would round the mantissas of its inputs to ten bits."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def network(backend: str) -> mf.SpikingResNet:
    torch.manual_seed(0)
    return mf.build_model("ds_resnet8", width=16, backend=backend).to(CUDA)


def spikes() -> Tensor:
    torch.manual_seed(1)
    return torch.randint(0, 3, (4, 3, 3, 16, 16), device=CUDA).float()


def concatenated(tensors: Iterable[Tensor]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors])


def gradients(model: torch.nn.Module, x: Tensor) -> Tensor:
    model(x).square().sum().backward()
    return concatenated(p.grad for p in model.parameters())


def relative_error(got: Tensor, want: Tensor) -> float:
    return ((got - want).norm() / want.norm()).item()


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_gradients_of_the_kernel_equal_the_reference(memory_format):
    got, want = (gradients(network(name).to(memory_format=memory_format), spikes()) for name in ("auto", "reference"))
    assert relative_error(got, want) < 1e-3
    assert triton.INTERPRETED or "triton" in mf.ops.backends_used()


@pytest.mark.parametrize(
    ("generator", "limit"), [("aot_eager", 1e-3), pytest.param("inductor", 0.5, marks=pytest.mark.slow)]
)
def test_torch_compile_captures_the_whole_network(generator, limit):
    """Generated code rounds differently, and a spike that flips by rounding flips others after it."""
    eager, x = network("auto"), spikes()
    compiled = torch.compile(copy.deepcopy(eager), fullgraph=True, backend=generator)
    assert relative_error(gradients(compiled, x), gradients(eager, x)) < limit


@pytest.mark.slow
def test_cuda_graphs_compute_the_same_steps():
    """The first calls record a graph and later calls replay it; every call must update the running statistics."""
    eager, x = network("auto"), spikes()
    graphed = copy.deepcopy(eager)
    step = torch.compile(graphed, fullgraph=True, mode="reduce-overhead")
    for _ in range(4):
        for model, call in ((eager, eager), (graphed, step)):
            model.zero_grad()
            call(x).square().sum().backward()
    found, expected = (concatenated(p.grad for p in model.parameters()) for model in (graphed, eager))
    assert relative_error(found, expected) < 0.5
    found, expected = (concatenated(model.buffers()) for model in (graphed, eager))
    assert relative_error(found, expected) < 0.05


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_network_learns(precision):
    cfg = replace(get_recipe("digits"), precision=precision)
    torch.manual_seed(0)
    model = model_from_config(cfg.model, cfg.backend).to(CUDA)
    optimizer = make_optimizer(model, cfg.optim)
    size = (cfg.data.timesteps, 20, cfg.model.in_channels, 16, 16)
    x, y = torch.randn(size, device=CUDA), torch.arange(20, device=CUDA) % cfg.model.num_classes
    losses = [train_step(model, optimizer, x, y, cfg).totals[0].item() for _ in range(30)]
    assert losses[-1] < losses[0] / 2
