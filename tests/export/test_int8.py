"""int8 networks: exact integer sums, the firing kernel, saved files, and refused networks and files."""

import dataclasses
import json
import random

import numpy as np
import pytest
import safetensors.torch
import torch

import multifire as mf
from multifire import ops
from multifire.cli import main
from multifire.config import ModelConfig
from multifire.export import int8_conv
from multifire.export.int8 import Int8MLF, Int8Network, largest_activation, quantise, quantise_network, save_int8
from multifire.export.int8_conv import CountConv2d, Int8Conv2d
from multifire.nn import model_from_config
from multifire.utils.tensor_files import read_tensors, write_tensors
from tests.export.test_provenance import run  # noqa: F401 - a fixture
from tests.nn.test_modules import settle

IMAGES = ModelConfig(name="ds_resnet14", in_channels=3, width=8)
COUNTS = ModelConfig(name="ds_resnet8", in_channels=2, width=8, norm_input=True)


def integer_sums(x: torch.Tensor, weight: torch.Tensor, stride: int) -> np.ndarray:
    """Return the convolution in 64-bit integers, by loops over the window."""
    kernel, padding = weight.shape[2], weight.shape[2] // 2
    padded = np.pad(x.numpy().astype(np.int64), ((0, 0), (0, 0), (padding, padding), (padding, padding)))
    rows, columns = ((size + 2 * padding - kernel) // stride + 1 for size in x.shape[2:])
    sums = 0
    for i in range(kernel):
        for j in range(kernel):
            window = padded[:, :, i : i + stride * rows : stride, j : j + stride * columns : stride][
                :, :, :rows, :columns
            ]
            sums = sums + np.einsum("nihw,oi->nohw", window, weight[:, :, i, j].numpy().astype(np.int64))
    return sums


@pytest.mark.parametrize("vendor", [True, False])
@pytest.mark.parametrize("largest", [1, 12, 129])
@pytest.mark.parametrize("shape", [(16, 16, 3, 1), (5, 7, 3, 2), (33, 40, 1, 2), (64, 70, 3, 1)])
def test_sums_are_exact(monkeypatch, shape, largest, vendor):
    if vendor and not int8_conv.vendor_has_int8():
        pytest.skip("torch has no int8 convolution on this machine")
    monkeypatch.setattr(int8_conv, "vendor_has_int8", lambda: vendor)
    torch.manual_seed(0)
    in_channels, out_channels, kernel, stride = shape
    conv = Int8Conv2d(in_channels, out_channels, kernel, stride)
    conv.weight.random_(-127, 128)
    conv.weight[0], conv.weight[1] = 127, -127
    x = torch.randint(0, largest + 1, (3, in_channels, 9, 10), dtype=torch.uint8)
    x[0] = largest
    for layout in (torch.contiguous_format, torch.channels_last):
        sums = conv(x.contiguous(memory_format=layout))
        assert np.array_equal(sums.numpy().astype(np.float64), integer_sums(x, conv.weight, stride))


@pytest.mark.parametrize("wrong_call", [1, 5])
def test_convolution_with_occasional_wrong_sums_is_not_used(monkeypatch, caplog, wrong_call):
    """After one wrong sum in one of five comparisons, float convolutions compute all sums of this shape."""
    if not int8_conv.vendor_has_int8():
        pytest.skip("torch has no int8 convolution on this machine")
    vendor_sums, calls = Int8Conv2d._vendor_sums, []

    def faulty(self, x):
        calls.append(x.shape)
        sums = vendor_sums(self, x)
        sums[-1, -1, -1, -1] += len(calls) == wrong_call
        return sums

    monkeypatch.setattr(Int8Conv2d, "_vendor_sums", faulty)
    torch.manual_seed(0)
    conv = Int8Conv2d(8, 16, 1, 2)
    conv.weight.random_(-127, 128)
    x = torch.randint(0, 13, (3, 8, 10, 10), dtype=torch.uint8)
    with caplog.at_level("WARNING", "multifire"):
        for _ in range(3):
            assert np.array_equal(conv(x).numpy().astype(np.float64), integer_sums(x, conv.weight, 2))
    assert len(calls) == int8_conv.COMPARISONS  # only the comparisons
    assert "gave wrong sums in 1 of 5 calls" in caplog.text
    assert np.array_equal(conv(x[:1]).numpy().astype(np.float64), integer_sums(x[:1], conv.weight, 2))
    assert len(calls) == 2 * int8_conv.COMPARISONS + 1  # comparisons of the other shape, and its sums


def test_sums_of_large_counts_are_exact():
    torch.manual_seed(0)
    conv = CountConv2d(2, 8, 3, 1)
    conv.weight.random_(-127, 128)
    for largest in (0, 1, 127, 128, 255, 256, 5000):
        x = torch.randint(0, largest + 1, (3, 2, 9, 10))
        x[0, 0, 0, 0] = largest
        assert np.array_equal(conv(x.float()).numpy().astype(np.float64), integer_sums(x, conv.weight, 1))
    for wrong, message in (
        (0.5, "not integers"),
        (-1.0, "not integers"),
        (float("inf"), "not integers"),
        (float("nan"), "not integers"),
        (1e6, "sums may reach"),
    ):
        with pytest.raises(ValueError, match=message):
            conv(torch.full((1, 2, 4, 4), wrong))


@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512", "avx512_bf16"])
@pytest.mark.parametrize("levels", [1, 2, 3, 5])
@pytest.mark.parametrize("channels", [1, 16, 33])
@pytest.mark.parametrize(
    ("membranes", "reset"), [("own", "zero"), ("own", "subtract"), ("shared", "any"), ("shared", "subtract")]
)
def test_kernel_equals_the_reference(isa, levels, channels, membranes, reset):
    if not ops.cpu.is_built():
        pytest.skip("the CPU kernel is not built")
    before = ops.cpu.isa()
    try:
        ops.cpu.use_isa(isa)
    except ValueError as error:
        pytest.skip(str(error))
    torch.manual_seed(0)
    try:
        for timesteps, static, channels_last in ((4, False, True), (3, True, True), (1, False, False)):
            step = (2, channels, 5, 7)
            sums = torch.randint(-900, 1500, (1 if static else timesteps, *step)).float()
            if channels_last:
                sums = sums.flatten(0, 1).contiguous(memory_format=torch.channels_last).unflatten(0, (-1, 2))
            for bias in (torch.randn(channels), torch.randn(channels, 5, 7)):
                arguments = {
                    "scale": (1 + torch.rand(channels)) / 600,
                    "bias": bias,
                    "thresholds": ops.default_thresholds(levels),
                    "add_after": torch.randint(0, 200, (timesteps, *step), dtype=torch.uint8),
                    "state": torch.randn(1 if membranes == "shared" else levels, *step),
                    "return_state": True,
                    "timesteps": timesteps,
                    "membranes": membranes,
                    "reset": reset,
                }
                out, state = ops.mlf_uint8(sums, **arguments, backend="cpu")
                expected, expected_state = ops.mlf_uint8(sums, **arguments, backend="reference")
                assert out.dtype == torch.uint8
                assert torch.equal(out, expected)
                assert torch.equal(state, expected_state)
                without = arguments | {"add_after": None, "state": None, "return_state": False}
                out, state = ops.mlf_uint8(sums, **without, backend="cpu")
                assert torch.equal(out, ops.mlf_uint8(sums, **without, backend="reference")[0])
                assert out.any()
                assert state is None
    finally:
        ops.cpu.use_isa(before)


def test_nothing_to_fire():
    for shape, bias in (((2, 1, 0, 2, 2), torch.zeros(0)), ((2, 1, 3, 0, 2), torch.zeros(3, 0, 2))):
        out, state = ops.mlf_uint8(torch.zeros(shape), torch.zeros(shape[2]), bias, return_state=True)
        assert out.shape == shape
        assert state.shape == (3, *shape[1:])


def test_firing_refuses_wrong_shapes_and_types():
    sums, per_channel = torch.zeros(2, 1, 3, 4, 4), torch.ones(3)
    for change, message in (
        ({"sums": sums.double()}, r"expected \[T, N, C, H, W\] in float32"),
        ({"sums": sums[0]}, r"expected \[T, N, C, H, W\]"),
        ({"timesteps": 3}, "timesteps = 3"),
        ({"scale": torch.ones(4)}, r"scale has shape \(4,\)"),
        ({"bias": torch.ones(3, 4, 5)}, r"bias \(3, 4, 5\)"),
        ({"scale": per_channel.half()}, r"scale is of torch.float16, expected torch.float32"),
        ({"bias": per_channel.double()}, "bias is of torch.float64"),
        ({"state": torch.zeros(3, 1, 3, 4, 4, dtype=torch.bfloat16)}, "state is of torch.bfloat16"),
        ({"add_after": sums}, "in uint8"),
        ({"state": sums}, "state has shape"),
    ):
        with pytest.raises(ValueError, match=message):
            ops.mlf_uint8(**({"sums": sums, "scale": per_channel, "bias": per_channel} | change))


def test_scales_have_least_error():
    torch.manual_seed(0)
    weight = torch.randn(32, 64, 3, 3)
    weight[1] = 0.0
    integers, scale = quantise(weight)
    assert integers.dtype == torch.int8
    assert integers.abs().max() == 127
    largest = weight.abs().amax((1, 2, 3)) / 127
    error, of_largest = (
        ((weight / s.clamp_min(1e-30)).round().clamp(-127, 127) * s - weight).square().sum((1, 2, 3))
        for s in (scale.view(-1, 1, 1, 1), largest.view(-1, 1, 1, 1))
    )
    torch.testing.assert_close(error, (integers * scale.view(-1, 1, 1, 1) - weight).square().sum((1, 2, 3)))
    assert (error <= 1.0001 * of_largest).all()
    assert error.sum() < 0.97 * of_largest.sum()
    assert (scale < 0.99 * largest)[2:].any()
    assert not integers[1].any()


def trained(model: ModelConfig) -> mf.SpikingResNet:
    """Return a network that fires and whose norms are not at their initial values."""
    torch.manual_seed(0)
    net = settle(model_from_config(model)).float()
    if net.input_norm is not None:
        net.input_norm.running_mean.copy_(torch.tensor([0.3, 0.7]))
    return net


def inputs(model: ModelConfig, timesteps: int = 3, samples: int = 11) -> torch.Tensor:
    torch.manual_seed(1)
    shape = (samples, model.in_channels, 12, 12)
    if model.norm_input:
        return torch.randint(0, 4, (timesteps, *shape)).float()
    return torch.randn(1, *shape).expand(timesteps, *shape)


def dequantised(network: Int8Network) -> mf.SpikingResNet:
    """Return a folded network in float64 with the weights of an int8 network."""
    folded = mf.export.fold(trained(network.model)).double()
    for name, layer in network.network.named_modules():
        if isinstance(layer, Int8MLF):
            conv = folded.get_submodule(name).conv
            conv.weight.data = layer.conv.weight.double() * layer.scale.double().view(-1, 1, 1, 1)
            conv.bias.data = layer.bias.double()
    folded.voting.load_state_dict(network.network.voting.state_dict())
    return folded


@pytest.mark.parametrize("model", [IMAGES, COUNTS])
def test_spikes_equal_those_of_the_dequantised_weights(model):
    """Compared layer by layer on the same input, in float64; a spike at its threshold may flip."""
    network = quantise_network(trained(model), model, counts=model.norm_input)
    reference, x = dequantised(network), inputs(model)
    fired: dict[str, torch.Tensor] = {}
    layers = {name: layer for name, layer in network.network.named_modules() if isinstance(layer, Int8MLF)}
    seen: dict[str, tuple] = {}
    for name, layer in layers.items():
        layer.register_forward_hook(
            lambda _, args, options, out, name=name: seen.update({name: (args[0], options.get("add_after"), out)}),
            with_kwargs=True,
        )
    network(x[:, :8])
    assert seen.keys() == layers.keys()
    for name, (before, add, out) in seen.items():
        exact = reference.get_submodule(name)
        if name == "stem" and reference.input_norm is not None:
            before = reference.input_norm(before.double())
        fired[name] = exact(before.double(), add_after=None if add is None else add.double())
        flipped = (fired[name] != out).double().mean()
        assert flipped < 1e-5, (name, flipped)
        assert out.max() > 0
        assert out.max() <= largest_activation(model)


@pytest.mark.parametrize("model", [IMAGES, COUNTS])
def test_loaded_and_streamed_networks_compute_the_same(tmp_path, run, model):  # noqa: F811
    network, x = quantise_network(trained(model), model, counts=model.norm_input), inputs(model)
    logits = network(x, per_step=True)
    assert logits.std() > 0.01
    path = tmp_path / "a.safetensors"
    save_int8(path, network, mf.export.make_provenance(run))
    again = mf.load_int8(path)
    assert again.provenance["recipe"] == "digits"
    assert torch.equal(again(x, per_step=True), logits)
    assert torch.equal(again(x), logits.mean(0))
    state = None
    for t, frame in enumerate(x, 1):
        mean, state = again.step(frame, state)
        torch.testing.assert_close(mean, logits[:t].mean(0))


def test_logits_are_close_to_the_float_network():
    network, x = trained(IMAGES), inputs(IMAGES, samples=32)
    with torch.no_grad():
        expected = network(x)
    error = (quantise_network(network, IMAGES, counts=False)(x) - expected).square().mean() / expected.var()
    assert error < 0.05


def test_inputs_are_checked():
    network = quantise_network(trained(COUNTS), COUNTS, counts=True)
    with pytest.raises(ValueError, match="not integers >= 0"):
        network(inputs(COUNTS) + 0.5)
    for wrong in (torch.zeros(2, 1, 3, 8, 8), torch.zeros(1, 2, 8, 8)):
        with pytest.raises(ValueError, match=r"expected \[T, N, 2, H, W\]"):
            network(wrong)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "plain_resnet8"}, "int8 is for ds_resnet"),
        ({"name": "ds_resnet266", "width": 1}, r"up to 135 = levels · \(1 \+ 44 blocks"),
    ],
)
def test_networks_without_small_integer_activations_are_refused(change, message):
    model = dataclasses.replace(COUNTS, **change)
    with pytest.raises(ValueError, match=message):
        quantise_network(trained(model), model, counts=True)


@pytest.fixture
def saved(tmp_path, run):  # noqa: F811
    path = tmp_path / "a.safetensors"
    save_int8(path, quantise_network(trained(COUNTS), COUNTS, counts=True), mf.export.make_provenance(run))
    return path


def test_damaged_files_are_refused(saved):
    content, rng = saved.read_bytes(), random.Random(0)
    for _ in range(50):
        altered, position = bytearray(content), rng.randrange(len(content))
        altered[position] ^= 1 << rng.randrange(8)
        saved.write_bytes(altered)
        with pytest.raises(ValueError, match=r"a\.safetensors: "):
            mf.load_int8(saved)
    for length in (0, 8, 100, len(content) // 2, len(content) - 1):
        saved.write_bytes(content[:length])
        with pytest.raises(ValueError, match="damaged"):
            mf.load_int8(saved)


def test_other_files_are_refused(tmp_path, run):  # noqa: F811
    with pytest.raises(FileNotFoundError, match="no such int8"):
        mf.load_int8(tmp_path / "none.safetensors")
    with pytest.raises(ValueError, match="a multifire checkpoint of version 1, expected a int8 of version 1"):
        mf.load_int8(run / "last.safetensors")
    path = tmp_path / "theirs.safetensors"
    safetensors.torch.save_file({"w": torch.zeros(3)}, path)
    with pytest.raises(ValueError, match="not a multifire int8"):
        mf.load_int8(path)


@pytest.mark.parametrize(
    ("alter", "message"),
    [
        (lambda t, h: t.pop("voting.weight"), "missing voting.weight"),
        (lambda t, h: t.update(extra=torch.zeros(1)), "extra extra"),
        (lambda t, h: t.update({"stem.scale": torch.ones(9)}), r"stem.scale of shape \[9\]"),
        (lambda t, h: t.update({"stem.conv.weight": t["stem.conv.weight"].float()}), "is of torch.float32"),
        (lambda t, h: t["stem.scale"].fill_(float("nan")), "not finite"),
        (lambda t, h: t["stages.0.0.fire1.conv.weight"].fill_(-128), "contains -128"),
        (lambda t, h: h["network"]["model"].update(width=10**9), "its header says"),
        (lambda t, h: h["network"]["model"].update(name="ds_resnet6000002"), "its header says"),
        (lambda t, h: h["network"]["model"].update(num_classes=10**12), "its header says"),
        (lambda t, h: h["network"]["model"].update(levels="3"), "model.levels is '3'"),
        (lambda t, h: h["network"]["model"].update(wdth=3), "unknown field model.wdth"),
        (lambda t, h: h["network"].update(model=3), "found int"),
        (lambda t, h: h["network"].update(counts="yes"), "does not describe its network"),
        (lambda t, h: h.update(network=[]), "does not describe its network"),
        (lambda t, h: h.update(provenance={}), "provenance is of version None"),
    ],
)
def test_invalid_contents_with_a_valid_digest_are_refused(saved, alter, message):
    header, tensors = read_tensors(saved, {"int8": 1})
    header.pop("digest")
    values = {name: json.loads(header[name]) for name in ("network", "provenance")}
    alter(tensors, values)
    write_tensors(saved, tensors, header | {name: json.dumps(value) for name, value in values.items()})
    with pytest.raises(ValueError, match=message):
        mf.load_int8(saved)


def test_export_from_the_command_line(run, capsys):  # noqa: F811
    assert main(["export", str(run), "--to", "int8", "--measure"]) == 0
    assert "accuracy" in capsys.readouterr().out
    path = run / "last-int8.safetensors"
    assert mf.load_int8(path).provenance["accuracy"][0]["of"] == "this int8 network"
    assert main(["inspect", str(path)]) == 0
    assert "of this int8 network on digits's test set" in capsys.readouterr().out
    assert main(["eval", str(path)]) == 0
    scored = json.loads((run / "eval-last-int8.json").read_text())
    assert scored["accuracy"] == mf.load_int8(path).provenance["accuracy"][0]["value"]
    assert f"accuracy {100 * scored['accuracy']:.2f} %" in capsys.readouterr().out
    assert main(["export", str(run / "none"), "--to", "int8"]) == 2
    assert "no config.json" in capsys.readouterr().err
