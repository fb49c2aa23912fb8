"""The largest activation that the builder states for each convolution, by which spikes are packed on a GPU."""

import pytest
import torch
from torch import Tensor, nn

import multifire as mf
from multifire import ops
from multifire.nn import SpikeConv2d
from multifire.ops import triton

NETWORKS = [
    (f"{kind}_resnet{depth}", levels) for kind in ("ds", "plain") for depth in (8, 14, 20, 26) for levels in (1, 3, 8)
]


def largest_inputs(model: nn.Module, x: Tensor) -> dict[SpikeConv2d, float]:
    """Return the largest input of each convolution behind neurons, all of whose inputs must be integers >= 0."""
    largest = {}

    def look(conv: nn.Module, inputs: tuple[Tensor]) -> None:
        assert torch.equal(inputs[0], inputs[0].round().clamp_min(0))
        largest[conv] = inputs[0].max().item()

    convs = [conv for conv in model.modules() if isinstance(conv, SpikeConv2d)]
    handles = [conv.register_forward_pre_hook(look) for conv in convs[1:]]  # not the stem's
    model(x)
    for handle in handles:
        handle.remove()
    assert convs[0].max_input is None
    assert set(largest) == set(convs[1:])
    return largest


@pytest.mark.parametrize(("name", "levels"), NETWORKS)
def test_no_activation_exceeds_the_stated_maximum(name, levels):
    for seed in range(3):
        torch.manual_seed(seed)
        model = mf.build_model(name, width=2, levels=levels)
        for conv, largest in largest_inputs(model, 4 * torch.randn(3, 2, 3, 8, 8)).items():
            assert conv.max_input is not None
            assert largest <= conv.max_input


@pytest.mark.parametrize(("name", "levels"), NETWORKS)
def test_activations_reach_the_stated_maximum(name, levels):
    """Every neuron gets a current above all thresholds, so that every level fires at every step."""
    model = mf.build_model(name, width=2, levels=levels)
    for norm in model.modules():
        if isinstance(norm, mf.nn.TdBatchNorm2d):
            nn.init.zeros_(norm.weight)
            nn.init.constant_(norm.bias, 10.0)
    largest = largest_inputs(model, torch.randn(3, 2, 3, 8, 8))
    assert {conv: float(conv.max_input) for conv in largest} == largest


def test_maximum_grows_with_each_dormant_suppressed_block_of_a_stage():
    model = mf.build_model("ds_resnet20", width=2)
    assert [block.fire1.conv.max_input for stage in model.stages for block in stage] == [3, 6, 9, 12, 6, 9, 12, 6, 9]
    assert {block.fire2.conv.max_input for stage in model.stages for block in stage} == {3}


@pytest.mark.skipif(not triton.INSTALLED or not triton.INTERPRETED, reason="needs Triton's interpreter")
@pytest.mark.parametrize("kind", ["ds", "plain"])
def test_gradients_of_a_network_are_the_same_bits_with_packed_spikes(monkeypatch, kind):
    monkeypatch.setenv("MULTIFIRE_BACKEND", "triton")
    grads, sizes = [], []
    for packs in (True, False):
        torch.manual_seed(0)
        model, x = mf.build_model(f"{kind}_resnet8", width=4), torch.randn(2, 2, 3, 8, 8)
        if not packs:
            for conv in model.modules():
                if isinstance(conv, SpikeConv2d):
                    conv.max_input = None
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda saved, kept=kept: kept.append(saved) or saved, lambda y: y
        ):
            loss = model(x).square().sum()
        loss.backward()
        grads.append([parameter.grad for parameter in model.parameters()])
        sizes.append(sum(saved.dtype == torch.uint8 for saved in kept))
    assert sizes == [8, 0]
    assert all(torch.equal(got, want) for got, want in zip(*grads, strict=True))


@pytest.mark.skipif(not ops.cpu.is_built(), reason=ops.cpu.NOT_BUILT)
def test_spikes_are_unpacked_in_the_types_of_layers_alone():
    packed = ops.pack_spikes(torch.ones(1000))
    assert packed is not None
    for dtype in (torch.float16, torch.float64):
        with pytest.raises(ValueError, match=rf"dtype is {dtype}, expected one of torch.float32, torch.bfloat16"):
            ops.unpack_spikes(packed, dtype)
