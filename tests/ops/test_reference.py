"""The reference equals the authors' code and has the properties that its definition implies."""

import pytest
import torch
from cases import assert_tdbn_equals_the_authors_code

import multifire as mf
from multifire.ops import surrogates

SURROGATES = list(surrogates.SURROGATES)


@pytest.mark.parametrize("timesteps", [4, 10, 40])
@pytest.mark.parametrize("levels", [1, 2, 3])
@pytest.mark.parametrize("kind", ["grid", "float"])
def test_mlf_equals_the_authors_code(golden, timesteps, levels, kind):
    unit = golden("mlf_unit")
    x = unit[f"T{timesteps}_{kind}_x"].requires_grad_()
    out, _ = mf.ops.mlf(x, mf.ops.default_thresholds(levels), backend="reference")
    out.backward(unit[f"T{timesteps}_{kind}_grad_out"])
    expected, grad = (unit[f"T{timesteps}_{kind}_K{levels}_{part}"] for part in ("out", "grad_x"))
    if kind == "grid":
        assert torch.equal(out, expected.to(out.dtype))
    torch.testing.assert_close(out, expected.to(out.dtype), rtol=0, atol=1e-5)
    torch.testing.assert_close(x.grad, grad, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["affine", "plain"])
def test_tdbn_equals_the_authors_code(golden, kind):
    assert_tdbn_equals_the_authors_code(golden("tdbn"), kind, "reference")


@pytest.mark.parametrize("surrogate", SURROGATES)
@pytest.mark.parametrize("detach_reset", [False, True])
def test_gradient_equals_the_recursion_of_the_definition(surrogate, detach_reset):
    """δ_k[t] = g[t]·h_k[t] + δ_k[t+1]·decay·((1 - s_k[t]) - u_k[t]·h_k[t]), computed in a loop."""
    torch.manual_seed(0)
    thresholds, decay, width = (0.5, 1.25, 2.0, 2.75), 0.5, 0.75
    x = torch.randn(6, 50, dtype=torch.float64).mul(1.5).requires_grad_()
    g = torch.randn(6, 50, dtype=torch.float64)
    out, _ = mf.ops.mlf(x, thresholds, decay, surrogate=surrogate, width=width, detach_reset=detach_reset)
    out.backward(g)

    expected = torch.zeros_like(g)
    for theta in thresholds:
        u, s = [], []
        for t in range(6):
            after_reset = u[-1] * (1 - s[-1]) if u else torch.zeros(50, dtype=torch.float64)
            u.append(decay * after_reset + x.detach()[t])
            s.append((u[-1] > theta).double())
        delta = torch.zeros(50, dtype=torch.float64)
        for t in reversed(range(6)):
            h = surrogates.SURROGATES[surrogate](u[t] - theta, width)
            gate = (1 - s[t]) - (0 if detach_reset else 1) * u[t] * h
            delta = g[t] * h + delta * decay * gate
            expected[t] += delta
    torch.testing.assert_close(x.grad, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("surrogate", SURROGATES)
@pytest.mark.parametrize("width", [0.5, 1.0, 2.0])
def test_surrogates_have_area_one(surrogate, width):
    v = torch.linspace(-2000, 2000, 4_000_001, dtype=torch.float64)
    area = torch.trapezoid(surrogates.SURROGATES[surrogate](v, width), v).item()
    assert area == pytest.approx(1, abs=2e-3)


def test_neuron_fires_only_above_its_threshold():
    out, _ = mf.ops.mlf(torch.tensor([[0.5, 0.50001]]), thresholds=(0.5,), backend="reference")
    assert out.tolist() == [[0, 1]]


def test_surrogate_windows_of_the_paper_leave_no_gap():
    v = torch.linspace(0.11, 3.09, 1000)
    slope = sum(surrogates.rect(v - theta, 1.0) for theta in mf.ops.PAPER_THRESHOLDS)
    assert (slope >= 1).all()


def test_two_calls_with_state_equal_one_call():
    torch.manual_seed(0)
    x = torch.randn(7, 3, 5)
    whole, last = mf.ops.mlf(x, backend="reference")
    first, state = mf.ops.mlf(x[:3], backend="reference")
    second, end = mf.ops.mlf(x[3:], state=state, backend="reference")
    assert torch.equal(whole, torch.cat([first, second]))
    assert torch.equal(last, end)


def test_half_precision_is_computed_in_fp32():
    x = (torch.randint(0, 400, (8, 100)) / 128).bfloat16()
    half, state = mf.ops.mlf(x, backend="reference")
    full, _ = mf.ops.mlf(x.float(), backend="reference")
    assert half.dtype == torch.bfloat16
    assert state.dtype == torch.float32
    assert torch.equal(half.float(), full)


def test_constant_channel_has_a_finite_gradient():
    """A channel with constant inputs has variance 0, where the square root has no finite derivative."""
    norm = mf.nn.TdBatchNorm2d(2, backend="reference")
    x = torch.zeros(4, 2, 2, 3, 3).index_fill_(2, torch.tensor([1]), 1.0).requires_grad_()
    norm(x).sum().backward()
    assert torch.isfinite(x.grad).all()
    assert torch.isfinite(norm.running_var).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: mf.ops.mlf(torch.zeros(0, 3)), r"x has shape \(0, 3\), expected \[T, \.\.\.\] with at least one"),
        (lambda: mf.ops.mlf(torch.zeros(2, 3, dtype=torch.uint8)), r"x is of torch.uint8, expected floating point"),
        (lambda: mf.ops.mlf(torch.zeros(2, 3), ()), "thresholds is empty"),
        (
            lambda: mf.ops.mlf(torch.zeros(2, 3), surrogate="sigmoids"),
            "unknown surrogate 'sigmoids', expected one of rect.*register_surrogate has registered",
        ),
        (lambda: mf.ops.mlf(torch.zeros(2, 3), width=0.0), "surrogate width is 0.0, expected above 0"),
        (
            lambda: mf.ops.mlf(torch.zeros(2, 3), state=torch.zeros(3, 4)),
            r"state has shape \(3, 4\), expected \(3, 3\)",
        ),
        (
            lambda: mf.ops.mlf(torch.zeros(2, 3), backend="refrence"),
            "unknown backend 'refrence'; did you mean reference",
        ),
        (lambda: mf.nn.TdBatchNorm2d(4)(torch.zeros(2, 4, 8, 8)), r"x has shape .*, expected \[T, N, 4, H, W\]"),
        (lambda: mf.nn.TdBatchNorm2d(4)(torch.zeros(2, 1, 3, 8, 8)), r"expected \[T, N, 4, H, W\]"),
        (lambda: mf.nn.TdBatchNorm2d(4)(torch.zeros(1, 1, 4, 1, 1)), "more than one value per channel"),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.ones(2)}, r"weight has shape \(2,\), expected \(8,\)"),
        ({"bias": torch.zeros(1)}, r"bias has shape \(1,\), expected \(8,\)"),
        ({"running_var": torch.ones(3)}, r"running_var has shape \(3,\), expected \(8,\)"),
        ({"timesteps": 0}, "timesteps = 0 >= 1"),
        ({"timesteps": -1}, "timesteps = -1 >= 1"),
        ({"timesteps": 3}, "timesteps = 3 >= 1"),
    ],
)
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_wrong_channels_and_time_steps_are_refused(change, message, backend):
    """A kernel would read beyond the end of a tensor that is too short."""
    arguments = {
        "x": torch.randn(2, 2, 8, 2, 2), "weight": torch.ones(8), "bias": torch.zeros(8),
        "running_mean": torch.zeros(8), "running_var": torch.ones(8),
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        mf.ops.tdbn_mlf(**(arguments | change), training=True, backend=backend)


def test_incomplete_norm_is_refused():
    x, mean = torch.zeros(2, 1, 2, 4, 4), torch.zeros(2)
    for norm, training in (((None, mean, None, None), False), ((None, None, mean, None), False), ((None,) * 4, True)):
        with pytest.raises(ValueError, match="without running_mean and running_var there is no norm"):
            mf.ops.tdbn_mlf(x, *norm, training=training)


def test_shortcut_of_another_shape_is_refused():
    norm = mf.nn.TdBatchNorm2d(2)
    with pytest.raises(ValueError, match=r"add_after has shape \(2, 1, 2, 4, 5\), expected x's \(2, 1, 2, 4, 4\)"):
        mf.ops.tdbn_mlf(
            torch.zeros(2, 1, 2, 4, 4), *norm.tensors(), training=True, add_after=torch.zeros(2, 1, 2, 4, 5)
        )
