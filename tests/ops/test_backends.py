"""Every fused backend equals the reference: outputs bit for bit on dyadic inputs, gradients to 1e-5."""

import importlib
from dataclasses import replace

import pytest
import torch
from cases import (
    Case,
    assert_close_grads,
    assert_same_outputs,
    assert_tdbn_equals_the_authors_code,
    channels_last,
    dyadic,
    each_backend,
    run,
    uniform,
)

import multifire as mf
from multifire import ops

SURROGATES = list(ops.surrogates.SURROGATES)


def assert_equals_reference(case: Case, backend: str, **options) -> None:
    got, want = run(case, backend, **options), run(case, "reference", **options)
    assert_same_outputs(got, want)
    assert_close_grads(got, want)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("layout", ["last", "contiguous"])
@pytest.mark.parametrize("channels", [1, 3, 16, 17, 64, 100])
@pytest.mark.parametrize("timesteps", [1, 4, 5, 40])
def test_shapes_equal_the_reference(backend, timesteps, channels, layout, training):
    assert_equals_reference(Case(timesteps, channels, layout=layout, training=training, add_after=True), backend)


@pytest.mark.parametrize("levels", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("add_before", [True, False])
@pytest.mark.parametrize("add_after", [True, False])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("state", [True, False])
def test_options_equal_the_reference(backend, levels, add_before, add_after, affine, state):
    for training in (True, False):
        case = Case(
            5, 17, levels, training=training, add_before=add_before, add_after=add_after, affine=affine, state=state
        )
        assert_equals_reference(case, backend)


@pytest.mark.parametrize("layout", ["last", "contiguous"])
@pytest.mark.parametrize("levels", [1, 2, 3, 5])
@pytest.mark.parametrize("timesteps", [1, 4, 40])
def test_state_over_any_number_of_steps_equals_the_reference(backend, timesteps, levels, layout):
    for training, affine, channels in ((True, False, 16), (False, True, 1), (False, False, 100)):
        case = Case(timesteps, channels, levels, layout, training, affine, add_before=True, add_after=True, state=True)
        assert_equals_reference(case, backend)


@pytest.mark.parametrize("surrogate", SURROGATES)
@pytest.mark.parametrize("detach_reset", [True, False])
@pytest.mark.parametrize("levels", [1, 2, 3, 5])
def test_surrogates_equal_the_reference(backend, surrogate, detach_reset, levels):
    for layout in ("last", "contiguous"):
        case = Case(6, 16, levels, layout, surrogate=surrogate, detach_reset=detach_reset, add_before=True, state=True)
        assert_equals_reference(case, backend)


@pytest.mark.parametrize("add_before", [True, False])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("layout", ["last", "contiguous"])
def test_static_input_equals_the_reference(backend, layout, training, add_before):
    case = Case(4, 17, layout=layout, training=training, add_before=add_before, add_after=True, static=True, state=True)
    assert_equals_reference(case, backend)


@pytest.mark.parametrize("size", [(1, 1, 1), (3, 1, 1), (1, 33, 1), (2, 100, 90), (7, 3, 11)])
@pytest.mark.parametrize("layout", ["last", "contiguous", "strided"])
def test_sizes_equal_the_reference(backend, layout, size):
    assert_equals_reference(Case(4, 5, layout=layout, size=size, add_before=True, add_after=True), backend)


def _expanded(shape):
    return torch.rand(1).expand(shape)


def _strided(shape):
    return torch.rand(*shape, 2)[..., 0]


def _other_layout(shape):
    return torch.rand(shape)


@pytest.mark.parametrize("make", [_expanded, _strided, _other_layout, lambda shape: channels_last(torch.rand(shape))])
@pytest.mark.parametrize("layout", ["last", "contiguous"])
def test_incoming_gradients_may_have_any_layout(backend, make, layout):
    grads = {"grad_out": make((4, 2, 17, 5, 7)), "grad_state_out": make((3, 2, 17, 5, 7))}
    assert_equals_reference(Case(4, 17, layout=layout, add_before=True, add_after=True, state=True), backend, **grads)


@pytest.fixture
def nan_in_uninitialised_memory():
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("nan_in_uninitialised_memory")
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("layout", ["last", "contiguous"])
def test_uninitialised_memory_does_not_reach_the_results(backend, training, layout):
    for static in (True, False):
        case = Case(5, 17, layout=layout, training=training, add_before=True, add_after=True, state=True, static=static)
        assert_equals_reference(case, backend)


def test_variance_of_a_nearly_constant_channel_with_a_large_mean_is_accurate(backend):
    """A single-pass sum of squares would lose this variance to rounding."""
    results = []
    for name in each_backend(backend, "reference"):
        torch.manual_seed(0)
        norm = mf.nn.TdBatchNorm2d(3, backend=name)
        results.append((norm(4096 + dyadic(4, 8, 3, 16, 16) / 128).cpu(), norm.running_var.cpu()))
    (out, var), (expected, expected_var) = results
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(var, expected_var, rtol=1e-6, atol=0)


def test_constant_channel_has_a_finite_gradient(backend):
    x = torch.zeros(4, 2, 2, 3, 3).index_fill_(2, torch.tensor([1]), 1.0).requires_grad_()
    norm = mf.nn.TdBatchNorm2d(2, backend=backend)
    norm(x).square().sum().backward()
    assert torch.isfinite(x.grad).all()


@pytest.mark.parametrize("training", [True, False])
def test_bf16_equals_the_reference(backend, training):
    """Storage is bf16 and arithmetic fp32: nearly all spikes agree; gradients differ by the rounding of storage."""
    case = Case(4, 64, training=training, add_after=True, add_before=True, dtype=torch.bfloat16)
    got, want = run(case, backend), run(case, "reference")
    differing = (got.outputs["out"] != want.outputs["out"]).float().mean()
    assert differing <= 1e-4
    assert_close_grads(got, want, rtol=2e-2)


def test_fp32_residual_is_not_rounded_to_bf16_before_it_is_added(backend):
    """Only x is bf16; add_before and add_after are fp32."""
    outs = []
    for name in each_backend(backend, "reference"):
        inputs = Case(4, 16, add_before=True, add_after=True).inputs()
        inputs["x"] = inputs["x"].bfloat16()
        norm = {"running_mean": torch.zeros(16), "running_var": torch.ones(16), "training": True}
        outs.append(ops.tdbn_mlf(**inputs, **norm, backend=name)[0].cpu())
    assert outs[0].dtype == torch.bfloat16
    assert torch.equal(*outs)


@pytest.mark.parametrize("shape", [(4, 3), (1, 100), (5, 2, 3, 4), (4, 2, 17, 5, 7), (3, 2, 2, 2, 2, 2)])
def test_mlf_equals_the_reference(backend, shape):
    torch.manual_seed(0)
    x, g = dyadic(*shape), torch.rand(shape)
    results = []
    for name in (backend, "reference"):
        leaf = x.clone().requires_grad_()
        out, state = ops.mlf(leaf, backend=name)
        (out * g).sum().backward()
        results.append((out, state, leaf.grad))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
    assert torch.equal(results[0][0], results[1][0])


def test_mlf_in_channels_last_equals_the_reference(backend):
    x = channels_last(dyadic(4, 2, 17, 5, 7))
    got, want = (ops.mlf(x, backend=name)[0] for name in (backend, "reference"))
    assert torch.equal(got, want)
    assert got.stride() == x.stride()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("layout", ["last", "contiguous"])
def test_norm_equals_the_reference(backend, layout, training):
    case = Case(4, 17, layout=layout)
    results = []
    for name in each_backend(backend, "reference"):
        inputs = case.inputs()
        leaves = [inputs[k].requires_grad_() for k in ("x", "weight", "bias")]
        y = ops.tdbn(*leaves, torch.zeros(17), torch.ones(17), training=training, backend=name)
        torch.manual_seed(1)
        (y * uniform(*y.shape)).sum().backward()
        results.append([x.cpu() for x in (y, *(leaf.grad for leaf in leaves))])
    assert torch.equal(results[0][0], results[1][0])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5 * want.abs().max().item())


@pytest.mark.parametrize("layout", ["last", "contiguous"])
@pytest.mark.parametrize("static", [True, False])
def test_call_without_a_norm_equals_the_reference(backend, static, layout):
    """A network whose norms are folded into its convolutions makes such calls."""
    inputs = Case(
        4, 17, layout=layout, static=static, add_before=True, add_after=True, state=True, affine=False
    ).inputs()
    no_norm = {"running_mean": None, "running_var": None, "training": False}
    timesteps = {"timesteps": 4, "return_state": True}
    got, want = (ops.tdbn_mlf(**inputs, **no_norm, **timesteps, backend=name) for name in (backend, "reference"))
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1], want[1])
    assert want[0].std() > 0


def test_output_has_the_memory_layout_of_the_input(backend):
    for layout in ("last", "contiguous"):
        case = Case(layout=layout)
        assert run(case, backend).outputs["out"].stride() == case.inputs()["x"].stride()


@pytest.mark.parametrize("training", [True, False])
def test_weight_alone_may_need_a_gradient(backend, training):
    """The input, the bias and the residuals need no gradient, and get none."""
    grads = []
    for name in each_backend(backend, "reference"):
        inputs = Case(add_before=True, add_after=True, state=True).inputs()
        weight = inputs["weight"]
        assert weight is not None
        weight.requires_grad_()
        norm = {"running_mean": torch.zeros(16), "running_var": torch.ones(16), "training": training}
        out, _ = ops.tdbn_mlf(**inputs, **norm, backend=name)
        torch.manual_seed(1)
        (out * uniform(*out.shape)).sum().backward()
        others = [tensor for tensor in (*inputs.values(), *norm.values()) if isinstance(tensor, torch.Tensor)]
        assert all(tensor.grad is None for tensor in others if tensor is not weight)
        assert weight.grad is not None
        grads.append(weight.grad.cpu())
    got, want = grads
    assert want.abs().min() > 0
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5 * want.abs().max().item())


@pytest.mark.parametrize("timesteps", [4, 10, 40])
@pytest.mark.parametrize("levels", [1, 2, 3])
@pytest.mark.parametrize("kind", ["grid", "float"])
def test_mlf_equals_the_authors_code(golden, backend, timesteps, levels, kind):
    unit = golden("mlf_unit")
    x = unit[f"T{timesteps}_{kind}_x"].requires_grad_()
    out, _ = ops.mlf(x, ops.default_thresholds(levels), backend=backend)
    out.backward(unit[f"T{timesteps}_{kind}_grad_out"])
    expected, grad = (unit[f"T{timesteps}_{kind}_K{levels}_{part}"] for part in ("out", "grad_x"))
    assert torch.equal(out, expected.to(out.dtype))
    torch.testing.assert_close(x.grad, grad, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["affine", "plain"])
def test_tdbn_equals_the_authors_code(golden, backend, kind):
    assert_tdbn_equals_the_authors_code(golden("tdbn"), kind, backend)


def test_error_of_a_backend_that_cannot_run_gives_the_reason(backend):
    with pytest.raises(ValueError, match=f"backend '{backend}' cannot run here: x is of torch.float64"):
        ops.mlf(torch.zeros(2, 3, dtype=torch.float64), backend=backend)
    with pytest.raises(ValueError, match=f"backend '{backend}' cannot run here: 9 levels"):
        ops.mlf(torch.zeros(2, 3), ops.default_thresholds(9), backend=backend)


def test_auto_uses_the_reference_where_no_kernel_can_run():
    x = torch.randn(4, 10, dtype=torch.float64)
    assert torch.equal(ops.mlf(x)[0], ops.mlf(x, backend="reference")[0])
    assert ops.mlf(x.float(), ops.default_thresholds(9))[0].shape == x.shape


def test_same_call_gives_the_same_results(backend):
    """Spikes, states, running statistics and gradients: the same bits, although several threads sum up each channel."""
    case = replace(Case(), size=(3, 40, 40), state=True)
    first, second = run(case, backend), run(case, backend)
    assert first.outputs.keys() == {"out", "state", "running_mean", "running_var"}
    assert_same_outputs(first, second)
    assert first.grads.keys() == second.grads.keys() == {"x", "weight", "bias", "state"}
    for name, grad in first.grads.items():
        assert torch.equal(grad, second.grads[name]), name


@pytest.mark.parametrize("inference", [False, True])
def test_backward_pass_uses_the_statistics_of_its_forward_pass(backend, inference):
    """A loss may use the same norm first in evaluation and then in training, which updates the statistics."""

    def gradient(backend: str) -> torch.Tensor:
        x, weight, bias = dyadic(3, 2, 5, 4, 4).requires_grad_(), torch.rand(5), torch.rand(5)
        with torch.inference_mode(inference):  # autograd may not save inference tensors for the backward pass
            mean, var = torch.zeros(5), torch.ones(5)
        out, _ = ops.tdbn_mlf(x, weight, bias, mean, var, training=False, backend=backend)
        with torch.inference_mode(inference):
            mean.add_(1.0)
            var.mul_(2.0)
        out.sum().backward()
        assert x.grad is not None
        return x.grad

    torch.manual_seed(0)
    want = gradient("reference")
    torch.manual_seed(0)
    assert torch.allclose(gradient(backend), want, rtol=1e-5, atol=1e-6)
    assert want.any()


def test_second_derivative_is_an_error_and_not_zero(backend):
    x = dyadic(3, 2, 5, 4, 4).requires_grad_()
    out, _ = ops.mlf(x, surrogate="atan", backend=backend)
    (slope,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="reference"):
        slope.square().sum().backward()


def test_batched_gradients_equal_single_gradients(backend):
    """torch.autograd.functional.jacobian(vectorize=True) computes gradients in this way."""
    x = dyadic(3, 2, 5, 4, 4).requires_grad_()
    out, _ = ops.mlf(x * 1, surrogate="atan", backend=backend)
    grads = torch.rand(3, *out.shape)
    (got,) = torch.autograd.grad(out, x, grads, is_grads_batched=True, retain_graph=True)
    for single, grad in zip(got, grads, strict=True):
        assert torch.equal(single, *torch.autograd.grad(out, x, grad, retain_graph=True))


@pytest.mark.parametrize("tangent_of", ["x", "weight", "add_after", "state"])
def test_forward_mode_derivative_is_an_error_and_not_zero(backend, tangent_of):
    tensors = {name: dyadic(3, 2, 5, 4, 4) for name in ("x", "add_after", "state")} | {"weight": torch.ones(5)}

    def spikes(tensor):
        replaced = {**tensors, tangent_of: tensor}
        x, weight = replaced.pop("x"), replaced.pop("weight")
        out, _ = ops.tdbn_mlf(
            x, weight, None, torch.zeros(5), torch.ones(5), training=False, backend=backend, **replaced
        )
        return out

    with pytest.raises(NotImplementedError, match="forward-mode"):
        torch.func.jvp(spikes, (tensors[tangent_of],), (torch.ones_like(tensors[tangent_of]),))


def test_reloaded_backend_module_replaces_its_op(backend):
    x = dyadic(3, 4)
    reloaded = importlib.reload(ops.BACKENDS[backend])
    out, _ = reloaded.mlf(x, (0.5,), 0.25, surrogate="rect", width=1.0, detach_reset=False, state=None)
    assert torch.equal(out, ops.mlf(x, (0.5,), 0.25, backend="reference")[0])


def op_of(backend: str):
    return getattr(torch.ops.multifire, f"tdbn_mlf_{backend}").default


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("return_state", [True, False])
def test_op_passes_opcheck(backend, training, affine, return_state):
    x = channels_last(dyadic(3, 2, 5, 4, 4)).requires_grad_()
    weight, bias = (torch.rand(5, requires_grad=True) if affine else None for _ in range(2))
    mean, var = (None, None) if training else (torch.zeros(5), torch.ones(5))
    add_before, add_after = dyadic(3, 2, 5, 4, 4).requires_grad_(), dyadic(3, 2, 5, 4, 4).requires_grad_()
    state = dyadic(2, 2, 5, 4, 4).requires_grad_() if return_state else None
    args = (x, weight, bias, mean, var, add_before, add_after, state, None, None, 3, training, False, 1e-5, 0.6,
            [0.6, 1.6], 0.25, "rect", 1.0, False, "zero", "own", False, return_state)  # fmt: skip
    torch.library.opcheck(op_of(backend), args)


def test_op_without_a_norm_passes_opcheck(backend):
    x = dyadic(3, 4).requires_grad_()
    args = (x, *[None] * 9, 3, False, False, 0.0, 1.0, [0.6], 0.25, "atan", 1.0, False, "zero", "own", False, True)
    torch.library.opcheck(op_of(backend), args)


@pytest.mark.parametrize(("membranes", "reset"), [("own", "zero"), ("shared", "any")])
def test_op_with_learned_numbers_passes_opcheck(backend, membranes, reset):
    x = dyadic(3, 4).requires_grad_()
    learned = torch.tensor([0.5, 1.5]).requires_grad_(), torch.tensor(0.25).requires_grad_()
    args = (x, *[None] * 7, *learned, 3, False, False, 0.0, 1.0, [0.5, 1.5], 0.25, "atan", 1.0, False, reset, membranes,
            True, True)  # fmt: skip
    torch.library.opcheck(op_of(backend), args)
