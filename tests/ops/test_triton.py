"""A few cases of the Triton kernel, and properties that only Triton has; without a GPU its interpreter runs them.

All of test_backends.py runs with Triton on a GPU; without a GPU only `make test-slow` does so.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases import (
    Case,
    assert_close_grads,
    assert_same_outputs,
    channels_last,
    device_of,
    dyadic,
    each_backend,
    fix_tile,
    integers,
    run,
    uniform,
)
from torch import Tensor

from multifire import ops
from multifire.nn import SpikeConv2d

REASON = ops.triton.why_not(torch.zeros(1, device=device_of("triton")), 1)
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))


@pytest.fixture(autouse=True)
def tensors_on_the_device_of_triton():
    with device_of("triton"):
        yield


@pytest.mark.parametrize(
    "case",
    [
        Case(4, 16, add_after=True),
        Case(1, 1, 8, add_before=True, state=True),
        Case(5, 64, training=False, add_after=True, dtype=torch.bfloat16),
        Case(3, 5, 2, layout="contiguous", add_before=True, add_after=True, state=True),
        Case(2, 17, 5, training=False, add_after=True, affine=False),
        Case(4, 3, static=True, state=True),
        Case(2, 3, 1, layout="contiguous", surrogate="triangle", detach_reset=True),
        Case(2, 100, 3, surrogate="atan", training=False, state=True),
        Case(9, 3, 2, add_before=True, state=True),  # more time steps than the backward pass recomputes at once
        Case(7, 3, 8, add_after=True),  # segments of one step
        Case(10, 33, 6, layout="contiguous", detach_reset=True, size=(2, 3, 3)),
        Case(40, 2, 2, surrogate="atan", size=(1, 3, 3)),
        Case(5, 33, 3, learned=True, state=True),
        Case(9, 3, 8, learned=True, add_before=True, surrogate="sigmoid", detach_reset=True),
        Case(4, 16, 3, learned=True, membranes="shared", reset="any", add_after=True, state=True),
        Case(9, 3, 4, learned=True, membranes="shared", reset="subtract", layout="contiguous", training=False),
        Case(6, 5, 1, learned=True, signed=True, surrogate="gaussian", static=True, state=True),
        Case(8, 2, 3, learned=True, signed=True, reset="subtract", state=True, size=(1, 3, 3)),
        Case(3, 17, 2, learned=True, signed=True, membranes="shared", reset="any", surrogate="triangle"),
        Case(10, 3, 2, learned=True, reset="subtract", detach_reset=True, dtype=torch.bfloat16),
    ],
)
def test_case_equals_the_reference(case):
    got, want = run(case, "triton"), run(case, "reference")
    assert_same_outputs(got, want)
    assert_close_grads(got, want, rtol=1e-5 if case.dtype == torch.float32 else 2e-2)


@pytest.mark.parametrize("shape", [(7,), (4, 3), (5, 2, 3, 4)])
def test_neurons_alone_take_any_number_of_dimensions(shape):
    torch.manual_seed(0)
    x, grad = dyadic(*shape), uniform(*shape)
    results = []
    for backend in each_backend("triton", "reference"):
        leaf = x.to(device_of(backend)).requires_grad_()
        out, state = ops.mlf(leaf, backend=backend)
        out.backward(grad.to(leaf.device))
        results.append([tensor.detach().cpu() for tensor in (out, state, leaf.grad)])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("layout", ["last", "contiguous"])
@pytest.mark.parametrize("tile", [64, 256, 1024])
def test_every_tile_equals_the_reference(monkeypatch, tile, layout):
    fix_tile(monkeypatch, tile)
    case = Case(6, 17, layout=layout, add_before=True, add_after=True, state=True, size=(2, 9, 11))
    got, want = run(case, "triton"), run(case, "reference")
    assert_same_outputs(got, want)
    assert_close_grads(got, want)


def test_code_for_gpus_spills_nothing_and_accesses_memory_in_wide_steps():
    """The interpreter accepts code that the compiler refuses, and it does not test the compiler."""
    program = Path(__file__).with_name("gpu_code.py")
    done = subprocess.run([sys.executable, program, "--json"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    reports = [json.loads(line) for line in done.stdout.splitlines()]
    kernels = {"measure", "forward", "backward", "coefficients_of_sums", "finish", "pack", "unpack"}
    assert {(report["capability"], report["kernel"]) for report in reports} == {
        (capability, kernel) for capability in (80, 90, 120) for kernel in kernels
    }
    for report in reports:
        assert report["spills"] == 0, report
        usual = report["case"].startswith(("CIFAR-10", "Gesture"))
        if report["kernel"] == "backward" or (usual and report["kernel"] == "measure"):
            assert_programs_share_a_multiprocessor(report)
        if usual:
            assert report["barriers"] == 0, report
        if report["case"].startswith("CIFAR-10"):
            assert_moves_each_value_once(report)
        if report["kernel"] in ("pack", "unpack"):
            assert report["barriers"] == 0, report
            assert report["widths"]["x"] == 16, report


def assert_programs_share_a_multiprocessor(report: dict) -> None:
    """As many programs as `Choice.programs` fit in its 65,536 registers."""
    choice = ops.triton.CHOICES[report["kernel"]]
    assert report["registers"] * 32 * choice.warps * choice.programs <= 65_536, report


def assert_moves_each_value_once(report: dict) -> None:
    """`forward`, for example, loads x and add_after and stores its output; each access is 8 bytes wide, 16 in fp32."""
    size = 2 if report["case"].endswith("bf16") else 4
    tensors = {
        "measure": {"x"},
        "forward": {"x", "after", "out"},
        "backward": {"x", "grad_out", "dy_out"},
        "finish": {"x", "dy", "dx"},
    }[report["kernel"]]
    assert report["widths"].keys() == tensors, report
    assert min(report["widths"].values()) >= 4 * size, report
    assert report["bytes"] == size * len(tensors), report


U = 2.0**-24
"""Largest relative error of one rounding to fp32."""


def test_statistics_are_as_exact_as_their_stated_bound():
    """|μ error| <= u·(|μ| + 8·mean|d|),  |σ² error| <= u·(3·σ² + 16·mean d²);  d = x - x₀, u = 2⁻²⁴.

    For each value, d is rounded once, d² once more, the sum of a segment up to four times, and Kahan's sums add two
    roundings; they do not grow with the number of values. The results are rounded to fp32, the running variance twice
    more, for its factor n/(n - 1). Without compensation, the constant values would exceed the bound.
    """
    torch.manual_seed(0)
    noise = 0.1 * torch.randn(4, 2, 3, 160, 160, device="cpu")
    noise[:, :, 1] = 0.7  # every sum is rounded in the same direction
    noise[0, 0, 1:, 0, 0] = -0.4  # x₀ is far from the mean
    x = channels_last(1000 + noise).to(torch.get_default_device())
    mean, var = torch.zeros(3), torch.ones(3)
    ops.tdbn(x, None, None, mean, var, training=True, momentum=1.0, backend="triton")
    values = x.double().transpose(0, 2).flatten(1)
    assert values.shape[1] > 2e5
    d = values - values[:, :1]
    squares = d.square().mean(1)
    expected_mean, expected_var = values.mean(1), values.var(1, correction=1)
    assert ((mean - expected_mean).abs() <= U * (expected_mean.abs() + 8 * d.abs().mean(1))).all()
    assert ((var - expected_var).abs() <= U * (3 * expected_var + 16 * squares)).all()


def test_sums_of_gradients_are_as_exact_as_their_stated_bound(monkeypatch):
    """The bound of triton_kernels.py, and the roundings of each product and of the results."""
    fix_tile(monkeypatch, 64, programs=1)
    torch.manual_seed(0)
    T, N, C, H, W = 10, 2, 4, 32, 32
    x, grad = (channels_last(0.9 + 0.2 * uniform(T, N, C, H, W)) for _ in range(2))
    weight, bias = torch.ones(C, requires_grad=True), torch.zeros(C, requires_grad=True)
    mean, var = 0.25 + uniform(C) / 2, torch.full((C,), 4.0)
    out = ops.tdbn(x, weight, bias, mean, var, training=False, eps=0.0, scale=1.0, backend="triton")
    out.backward(grad)
    processors = ops.triton._processors(x.device)
    tiles_of_a_program = -(-N * H * W // (64 // C)) // min(processors, N * H * W // (64 // C)) + 1
    roundings = 5 + tiles_of_a_program * (T // 5)  # segments have five steps
    dims = (0, 1, 3, 4)
    d = (x - mean.view(-1, 1, 1)).double()  # the kernel's x - μ, rounded
    products = grad.double() * d
    bias_error = (bias.grad - grad.double().sum(dims)).abs()
    assert (bias_error <= U * ((roundings + 1) * grad.double().abs().sum(dims))).all()
    weight_error = (weight.grad - products.sum(dims) / 2).abs()
    assert (weight_error <= U * (roundings + 2) * products.abs().sum(dims) / 2).all()


def test_same_call_gives_the_same_bits_twenty_times(monkeypatch):
    fix_tile(monkeypatch, 64)
    case = Case(5, 3, 2, add_before=True, state=True, size=(2, 5, 5))
    first = run(case, "triton")
    for _ in range(19):
        again = run(case, "triton")
        assert_same_outputs(again, first)
        assert again.grads.keys() == first.grads.keys()
        assert all(torch.equal(again.grads[name], grad) for name, grad in first.grads.items())


def test_each_launch_counts_its_own_programs(monkeypatch):
    """A counter that two launches shared would let one add up sums that the other has not stored yet."""
    fix_tile(monkeypatch, 64)
    launches = []

    class Recorder:
        def __init__(self, kernel):
            self.kernel, self.position = kernel, kernel.arg_names.index("counters")

        def __getitem__(self, grid):
            def launch(*args, **options):
                counters = args[self.position]
                assert counters.eq(0).all()
                self.kernel[grid](*args, **options)
                launches.append((grid, counters))

            return launch

    kernels = ops.triton._kernels()
    for name in ("measure", "backward"):
        monkeypatch.setattr(kernels, name, Recorder(getattr(kernels, name)))
    for _ in range(2):
        run(Case(2, 65, 1, size=(2, 3, 3)), "triton")
    assert len(launches) == 4
    assert len({counters.data_ptr() for _, counters in launches}) == 4
    for (programs, blocks), counters in launches:
        assert programs > 1
        assert counters.tolist() == [programs] * blocks == [programs] * 2


def test_empty_batch_has_empty_spikes_and_no_gradient():
    x = torch.zeros(3, 0, 5, 4, 4, requires_grad=True)
    weight = torch.ones(5, requires_grad=True)
    out, _ = ops.tdbn_mlf(x, weight, None, torch.zeros(5), torch.ones(5), training=False, backend="triton")
    out.sum().backward()
    assert out.shape == x.grad.shape == x.shape
    assert weight.grad.tolist() == [0] * 5


@pytest.fixture
def packs_with_triton(monkeypatch):
    monkeypatch.setenv("MULTIFIRE_BACKEND", "triton")


@pytest.mark.usefixtures("packs_with_triton")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("bits", "largest"), [(2, 1), (2, 3), (4, 4), (4, 15), (8, 16), (8, 255)])
def test_packed_spikes_are_unpacked_to_the_same_values(dtype, bits, largest):
    torch.manual_seed(0)
    for shape in ((0,), (1,), (1023,), (1024,), (4097,), (3, 5, 17, 19)):
        for order in (torch.contiguous_format, torch.channels_last)[: 2 if len(shape) == 4 else 1]:
            x = integers(0, largest + 1, shape).to(dtype).contiguous(memory_format=order)
            packed = ops.pack_spikes(x, max_value=largest)
            assert packed is not None
            assert packed.bits == bits
            assert packed.bytes.numel() < x.numel() * bits / 8 + ops.triton.CHOICES["pack"].tile
            unpacked = ops.unpack_spikes(packed, dtype)
            assert unpacked.dtype == dtype
            assert unpacked.stride() == x.stride()
            assert torch.equal(unpacked, x)


@pytest.mark.usefixtures("packs_with_triton")
def test_spikes_without_a_known_maximum_are_not_packed():
    assert ops.pack_spikes(torch.ones(8)) is None
    assert ops.pack_spikes(torch.ones(8), max_value=256) is None
    assert ops.pack_spikes(torch.ones(8, dtype=torch.float64), max_value=3) is None


@pytest.mark.usefixtures("packs_with_triton")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("kernel", "stride"), [(3, 1), (3, 2), (1, 2)])
@pytest.mark.parametrize("largest", [3, 12, 40])
def test_convolution_of_packed_spikes_has_the_gradients_of_unpacked_ones(monkeypatch, dtype, kernel, stride, largest):
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    torch.manual_seed(0)
    conv = SpikeConv2d(5, 6, kernel, stride, padding=kernel // 2, bias=False).to(dtype)
    x = integers(0, largest + 1, (3, 5, 9, 7)).to(dtype).contiguous(memory_format=torch.channels_last)
    results = []
    for conv.max_input in (None, largest):
        kept: list[Tensor] = []
        leaf = x.clone().requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(
            lambda saved, kept=kept: kept.append(saved) or saved, lambda y: y
        ):
            out = conv(leaf)
        assert any(tensor.dtype == torch.uint8 for tensor in kept) == (conv.max_input is not None)
        torch.manual_seed(1)
        grad = uniform(*out.shape).to(dtype)
        results.append((out, *torch.autograd.grad(out, [leaf, conv.weight], grad)))
    assert all(torch.equal(got, want) for got, want in zip(*results, strict=True))


def test_cpu_without_the_interpreter_is_refused():
    program = (
        "import os; os.environ.pop('TRITON_INTERPRET', None)\n"
        "import torch, multifire as mf\n"
        "try: mf.ops.mlf(torch.zeros(2, 3), backend='triton')\n"
        "except ValueError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "backend 'triton' cannot run here: x lies on cpu, and Triton compiles for GPUs" in done.stdout


def test_auto_does_not_choose_the_interpreter_for_a_cpu_tensor():
    assert ops.choose_backend("auto", torch.zeros(1, device="cpu")) is not ops.triton
