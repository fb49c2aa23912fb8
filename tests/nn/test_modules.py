"""Streaming step by step, input shapes, parameter counts, and the model builder."""

import pytest
import torch

import multifire as mf
from multifire.config import ModelConfig
from multifire.config.parameters import count_parameters

T = 5
STREAM = {"rtol": 1e-10, "atol": 1e-10}


def frames(channels: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.randn(T, 2, channels, 8, 8, dtype=torch.float64, generator=generator)


def settle(module: torch.nn.Module) -> torch.nn.Module:
    """Set the norms' running statistics to random values, so that neurons fire in evaluation mode."""
    for norm in module.modules():
        if isinstance(norm, mf.nn.TdBatchNorm2d):
            torch.nn.init.uniform_(norm.running_mean, -0.5, 0.5)
            torch.nn.init.uniform_(norm.running_var, 0.2, 2.0)
    return module.double().eval()


@pytest.mark.parametrize(
    "make",
    [
        mf.nn.MLF,
        lambda: mf.nn.DSBlock(3, 3),
        lambda: mf.nn.DSBlock(3, 6, 2),
        lambda: mf.nn.PlainBlock(3, 3),
        lambda: mf.nn.PlainBlock(3, 6, 2),
    ],
)
def test_steps_equal_one_call(make):
    torch.manual_seed(0)
    module, x = settle(make()), frames(3)
    state, outs = None, []
    for frame in x:
        out, state = module.step(frame, state)
        outs.append(out)
    whole = module(x)
    assert whole.any()
    torch.testing.assert_close(torch.stack(outs), whole, **STREAM)


@pytest.mark.parametrize("name", ["ds_resnet8", "plain_resnet14"])
def test_network_steps_equal_one_call(name):
    torch.manual_seed(0)
    net, x = settle(mf.build_model(name, in_channels=2, width=4, norm_input=True)), frames(2)
    with torch.no_grad():
        per_step = net(x, per_step=True)
    state = None
    for t, frame in enumerate(x, 1):
        logits, state = net.step(frame, state)
        torch.testing.assert_close(logits, per_step[:t].mean(0), **STREAM)
    torch.testing.assert_close(logits, net(x), **STREAM)


def test_step_refuses_training_mode_and_the_state_of_another_network():
    net = mf.build_model("ds_resnet8", 2, width=4)
    frame = torch.zeros(1, 2, 8, 8)
    with pytest.raises(ValueError, match=r"call model.eval\(\) first"):
        net.step(frame)
    with pytest.raises(ValueError, match=r"call model.eval\(\) before step"):
        net.stem.step(frame)
    _, state = net.eval().step(frame)
    fewer = {name: u for name, u in state.membranes.items() if name != "stem"}
    with pytest.raises(ValueError, match="the state has no layer 'stem'"):
        net.step(frame, state._replace(membranes=fewer))
    more = {**state.membranes, "stem.stem": state.membranes["stem"]}
    with pytest.raises(ValueError, match=r"the state has a layer 'stem.stem' that did not run in this step"):
        net.step(frame, state._replace(membranes=more))
    with pytest.raises(ValueError, match=r"state has shape \(3, 1, 4, 8, 8\), expected \(3, 1, 4, 6, 6\)"):
        net.step(torch.zeros(1, 2, 6, 6), state)


class TwoBranches(mf.nn.Streaming):
    """Two layers of neurons, of which another one runs first in every step."""

    def __init__(self):
        super().__init__()
        self.left, self.right = mf.nn.MLF(decay=0.5), mf.nn.MLF(decay=0.9)
        self.left_first = False

    def forward(self, x, stream=None):
        self.left_first = not self.left_first
        if self.left_first:
            left = self.left(x, stream)
            return left + 10 * self.right(x, stream)
        right = self.right(x, stream)
        return self.left(x, stream) + 10 * right


def test_a_stream_does_not_depend_on_the_order_of_its_layers():
    x = torch.rand(6, 2, 3)
    module, state, out = TwoBranches(), None, []
    for frame in x:
        spikes, state = module.step(frame, state)
        out.append(spikes)
    assert torch.equal(torch.stack(out), module(x))
    assert set(state) == {"left", "right"}


def test_a_stream_refuses_neurons_that_run_twice_or_lie_elsewhere():
    class Twice(mf.nn.Streaming):
        def __init__(self, neuron):
            super().__init__()
            self.neuron = neuron

        def forward(self, x, stream=None):
            return self.neuron(self.neuron(x, stream), stream)

    frame = torch.rand(2, 3)
    with pytest.raises(ValueError, match="the layer 'neuron' ran twice in one step"):
        Twice(mf.nn.MLF()).step(frame)
    elsewhere = mf.nn.MLF()
    with pytest.raises(ValueError, match="a layer of the stream is no submodule of the network that runs: MLF"):
        Twice(lambda x, stream: elsewhere(x, stream)).step(frame)


def test_calls_are_stateless():
    torch.manual_seed(0)
    net, x = settle(mf.build_model("ds_resnet8", 2, width=4)), frames(2)
    assert torch.equal(net(x), net(x))


def test_ds_activations_are_small_integers():
    torch.manual_seed(0)
    net = mf.build_model("ds_resnet14", 2, width=4)
    seen = []
    for stage in net.stages:
        for block in stage:
            block.register_forward_hook(lambda module, args, out: seen.append(out))
    net(frames(2).float())
    blocks, levels = 2, 3
    for out in seen:
        assert torch.equal(out, out.round())
        assert 0 <= out.min() <= out.max() <= levels * (blocks + 1)


@pytest.mark.parametrize(
    ("name", "options", "published"),
    [
        ("ds_resnet20", {"in_channels": 3, "width": 64}, 4_327_754),
        ("ds_resnet20", {"in_channels": 2, "width": 16, "num_classes": 11, "norm_input": True}, 272_395),
        ("ds_resnet14", {"in_channels": 2, "width": 32}, 696_330),
    ],
)
def test_parameter_counts_equal_those_of_the_paper(name, options, published):
    net = mf.build_model(name, **options)
    assert sum(parameter.numel() for parameter in net.parameters()) == published
    assert count_parameters(ModelConfig(name=name, **options)) == published


@pytest.mark.parametrize("depth", [8, 14, 20, 32, 44, 68])
@pytest.mark.parametrize("kind", ["ds", "plain"])
def test_depth_in_the_name_is_the_number_of_layers(kind, depth):
    net = mf.build_model(f"{kind}_resnet{depth}", width=1)
    convolutions = [m for n, m in net.named_modules() if isinstance(m, torch.nn.Conv2d) and "shortcut" not in n]
    assert len(convolutions) + 1 == depth
    assert count_parameters(ModelConfig(name=f"{kind}_resnet{depth}", width=1)) == sum(
        parameter.numel() for parameter in net.parameters()
    )


@pytest.mark.parametrize("levels", [1, 2, 5])
@pytest.mark.parametrize("surrogate", ["rect", "triangle", "atan"])
def test_gradients_are_finite_and_reach_the_stem(levels, surrogate):
    torch.manual_seed(0)
    net = mf.build_model("ds_resnet8", 2, width=4, levels=levels, surrogate=surrogate)
    net(frames(2).float()).square().sum().backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in net.parameters())
    assert net.stem.conv.weight.grad.norm() > 0


@pytest.mark.parametrize("name", ["ds_resnet", "ds_resnet21", "ds_resnet2", "resnet20", "ds_resnet²0", "DS_resnet20"])
def test_unknown_model_is_refused(name):
    with pytest.raises(ValueError, match="expected ds_resnetD, plain_resnetD, ms_resnetD or sew_resnetD with"):
        mf.build_model(name)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda net: net(torch.zeros(4, 3, 8, 8)), r"shape \(4, 3, 8, 8\), expected \[T, N, 3, H, W\]: time first"),
        (lambda net: net(torch.zeros(4, 1, 2, 8, 8)), r"expected \[T, N, 3, H, W\]"),
        (lambda net: mf.build_model("ds_resnet8", thresholds=(1.0,)), "one for each of levels = 3"),
        (lambda net: mf.build_model("ds_resnet8", levels=0), "levels = 0 >= 1"),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(mf.build_model("ds_resnet8", width=2))
