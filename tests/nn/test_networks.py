"""Check the networks beside the paper's: VGG, membrane-shortcut and spike-element-wise blocks, and large images."""

import pytest
import torch
from torch import nn

import multifire as mf
from multifire.config import ModelConfig
from multifire.config.architecture import architecture
from multifire.config.parameters import count_parameters
from multifire.nn import ConvFire, MSBlock, SpikeConv2d, config_of_model, model_from_config

NAMES = ["vgg9", "vgg11", "ms_resnet8", "ms_resnet14", "sew_resnet8", "ds_resnet18", "plain_resnet34", "ms_resnet18"]


def build(name: str, **options) -> nn.Module:
    torch.manual_seed(0)
    return mf.build_model(name, in_channels=2, width=4, num_classes=5, **options)


def frames(name: str, timesteps: int = 3) -> torch.Tensor:
    size = 40 if architecture(name).imagenet else 12
    return torch.rand(timesteps, 2, 2, size, size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", NAMES)
def test_the_counted_parameters_are_those_of_the_network(name):
    model = build(name)
    cfg = ModelConfig(name=name, in_channels=2, width=4, num_classes=5)
    assert count_parameters(cfg) == sum(p.numel() for p in model.parameters())
    assert config_of_model(model).name == name
    built = model_from_config(config_of_model(model))
    assert {k: v.shape for k, v in built.state_dict().items()} == {k: v.shape for k, v in model.state_dict().items()}


@pytest.mark.parametrize("name", NAMES)
def test_the_depth_in_the_name_is_the_number_of_layers(name):
    model = build(name)
    shortcuts = [m for n, m in model.named_modules() if n.endswith("shortcut.conv")]
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert len(convolutions) - len(shortcuts) + 1 == architecture(name).depth


@pytest.mark.parametrize("name", NAMES)
def test_steps_give_the_logits_of_one_call(name):
    model, x_TNCHW = build(name).eval(), frames(name)
    logits, state = None, None
    for frame_NCHW in x_TNCHW:
        logits, state = model.step(frame_NCHW, state)
    torch.testing.assert_close(logits, model(x_TNCHW))


@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_gets_a_gradient(name):
    model, x_TNCHW = build(name, backend="reference").double(), frames(name).double()
    model(x_TNCHW).square().sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())
    assert sum(bool(p.grad.any()) for p in model.parameters()) > len(list(model.parameters())) // 2


@pytest.mark.parametrize("name", ["vgg9", "ms_resnet8", "ds_resnet18"])
def test_checkpointed_stages_give_the_same_gradients(name):
    grads = []
    for checkpointed in (False, True):
        model = build(name, checkpoint_stages=checkpointed)
        model(frames(name)).square().sum().backward()
        grads.append([p.grad for p in model.parameters()] + list(model.buffers()))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("name", ["vgg9", "sew_resnet8", "ds_resnet18", "plain_resnet34"])
def test_no_activation_exceeds_the_bound_of_its_convolution(name):
    model = build(name)
    seen: list[tuple[int, float]] = []

    def check(conv: SpikeConv2d, inputs: tuple, _out) -> None:
        assert conv.max_input is not None
        seen.append((conv.max_input, inputs[0].max().item()))

    for module in model.modules():
        if isinstance(module, SpikeConv2d) and module is not model.stem.conv:
            module.register_forward_hook(check)
    for norm in (m.norm for m in model.modules() if isinstance(m, ConvFire)):
        nn.init.constant_(norm.bias, 9.0)  # every neuron fires at every level
    model(frames(name))
    assert all(found <= bound for bound, found in seen)
    assert all(found == bound for bound, found in seen[:2])


def test_the_membrane_shortcut_passes_currents_unchanged():
    block = MSBlock(4, 4).eval()
    nn.init.zeros_(block.conv.conv.weight)
    x_TNCHW = torch.randn(3, 2, 4, 6, 6)
    torch.testing.assert_close(block(x_TNCHW), x_TNCHW)


def test_a_sew_block_computes_what_a_dormant_suppressed_block_does():
    ds, sew = build("ds_resnet8"), build("sew_resnet8")
    sew.load_state_dict(ds.state_dict())
    x_TNCHW = frames("sew_resnet8")
    assert torch.equal(ds.eval()(x_TNCHW), sew.eval()(x_TNCHW))


@pytest.mark.parametrize(
    "name", ["ds_resnet19", "ms_resnet", "vgg10", "sew_resnet2", "resnet18", "ds_resnet-8", "vgg9x"]
)
def test_an_unknown_name_is_refused(name):
    with pytest.raises(ValueError, match=f"unknown model '{name}'; expected ds_resnetD"):
        mf.build_model(name)


@pytest.mark.parametrize("name", ["vgg9", "ms_resnet8", "ds_resnet18"])
def test_energy_and_activity_are_measured(name):
    model = build(name).eval()
    batches = [(frames(name), torch.zeros(2, dtype=torch.long))]
    energy, activity = mf.analysis.measure_energy(model, batches), mf.analysis.measure_activity(model, batches)
    assert energy.synops > 0
    assert 0 <= activity.dormant <= 1
    shortcuts = [c for c in energy.connections if c.name.endswith("shortcut.conv")]
    if name == "ms_resnet8":
        assert {"stages.0.0.fire1", "stages.2.0.fire2", "last"} <= {layer.name for layer in activity.layers}
        assert any(c.macs > 0 for c in shortcuts)
    else:
        assert all(c.macs == 0 for c in shortcuts)
