"""What the fused backends share: the custom op, its fake implementation for compilers, its gradients, its Python API.

A backend provides four functions that fill tensors, see call.py; reference.py defines what they compute.

An eager call runs the op's body without torch's dispatcher, which costs 0.2 to 0.5 ms between convolutions. That is
right only while nothing needs to see the op: no compiler, dispatch mode, functorch transform, jit trace or tensor
subclass is active, which `_needs_dispatcher` asks of torch, partly through private functions of torch._C. The tests
tests/nn/test_fused.py and tests/ops/test_backends.py run under each of these and fail if the op is not seen there.

Shapes: T time steps, K levels, N samples, C channels, H rows, W columns.
"""

from collections.abc import Callable, Sequence
from types import NoneType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from multifire.ops import collective, reference
from multifire.ops.call import Backend, Call, Gradients, is_channels_last


class FusedOps:
    """`mlf`, `tdbn` and `tdbn_mlf` with the reference's signatures, computed by a backend."""

    def __init__(self, name: str, backend: Backend, device_types: str | None):
        self._op, self._eager, self._body = _register(name, backend, device_types)
        self._move_running = backend.move_running

    def _run(self, x: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Call the op, or its body if torch's dispatcher is not needed."""
        if _needs_dispatcher(x, *args[:TENSORS]):
            return self._op(x, *args)
        return self._eager(x, *args) if torch.is_grad_enabled() else self._body(x, *args)

    def mlf(
        self,
        x: Tensor,
        thresholds: Sequence[float],
        decay: float,
        *,
        surrogate: str,
        width: float,
        detach_reset: bool,
        state: Tensor | None,
        reset: str = "zero",
        membranes: str = "own",
        signed: bool = False,
        learned_thresholds: Tensor | None = None,
        learned_decay: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Multi-level firing over time; see `multifire.ops.mlf`."""
        _refuse_tangents(x, state, learned_thresholds, learned_decay)
        out, last, *_ = self._run(
            x, None, None, None, None, None, None, _float(state), _row(learned_thresholds), _float(learned_decay),
            x.shape[0], False, False, 0.0, 1.0, thresholds, decay, surrogate, width, detach_reset,
            reset, membranes, signed, True,
        )  # fmt: skip
        return out, last

    def tdbn(
        self,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor,
        running_var: Tensor,
        *,
        training: bool,
        sync: bool,
        momentum: float,
        eps: float,
        scale: float,
    ) -> Tensor:
        """Threshold-dependent batch norm in fp32, computed by the kernel with no levels."""
        return self.tdbn_mlf(
            x.float(), weight, bias, running_mean, running_var,
            training=training, sync=sync, momentum=momentum, eps=eps, scale=scale,
            thresholds=(), decay=0.0, surrogate="rect", width=1.0, detach_reset=False,
            add_before=None, add_after=None, state=None, return_state=False, timesteps=x.shape[0],
        )[0]  # fmt: skip

    def tdbn_mlf(
        self,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        *,
        training: bool,
        sync: bool,
        momentum: float,
        eps: float,
        scale: float,
        thresholds: Sequence[float],
        decay: float,
        surrogate: str,
        width: float,
        detach_reset: bool,
        add_before: Tensor | None,
        add_after: Tensor | None,
        state: Tensor | None,
        return_state: bool,
        timesteps: int,
        reset: str = "zero",
        membranes: str = "own",
        signed: bool = False,
        learned_thresholds: Tensor | None = None,
        learned_decay: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Norm, sum, firing, sum; see `multifire.ops.tdbn_mlf`."""
        _refuse_tangents(x, weight, bias, add_before, add_after, state, learned_thresholds, learned_decay)
        dtype = x.dtype
        if any(add is not None and add.dtype != dtype for add in (add_before, add_after)):
            x, add_before, add_after = x.float(), _float(add_before), _float(add_after)
        out, new_state, mean, var, values = self._run(
            x, _float(weight), _float(bias),
            None if training else _row(running_mean), None if training else _row(running_var),
            add_before, add_after, _float(state), _row(learned_thresholds), _float(learned_decay),
            timesteps, training, sync, eps, scale, thresholds, decay, surrogate, width, detach_reset,
            reset, membranes, signed, return_state,
        )  # fmt: skip
        if training and running_mean is not None and running_var is not None:
            n = values if sync else timesteps * x.shape[1] * x.shape[3] * x.shape[4]
            needs_dispatcher = _needs_dispatcher(x, running_mean, running_var)
            move = reference.move_running if needs_dispatcher else self._move_running
            move(running_mean, running_var, mean, var, n, momentum)
        return out.to(dtype), new_state if return_state else None


TENSORS = 9
"""Number of arguments after x that are tensors or None."""


def _needs_dispatcher(*tensors: Tensor | None) -> bool:
    """Return True if torch.compile, a dispatch mode, a functorch transform or a jit trace is active."""
    return (
        torch.compiler.is_compiling()
        or any(type(x) not in (Tensor, nn.Parameter, NoneType) for x in tensors)
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._are_functorch_transforms_active()
        or torch.jit.is_tracing()
    )


def _can_skip_dispatcher(x: Tensor, *grads: Tensor | None) -> bool:
    """Return True if a backward pass needs neither batched gradients nor the op's error for second derivatives."""
    batched = any(g is not None and torch._C._functorch.is_legacy_batchedtensor(g) for g in grads)  # pyright: ignore[reportAttributeAccessIssue]
    return not (batched or torch.is_grad_enabled() or _needs_dispatcher(x))


def _refuse_tangents(*tensors: Tensor | None) -> None:
    """Raise an error for forward-mode derivatives, which torch would silently drop at a custom op."""
    if torch.compiler.is_compiling():  # a compiled graph has no forward mode
        return
    if any(x is not None and forward_ad.unpack_dual(x).tangent is not None for x in tensors):
        raise NotImplementedError(
            "the fused backends have no forward-mode derivatives (torch.func.jvp, jacfwd); use backward, or for tdbn "
            'alone backend="reference"'
        )


def _float(x: Tensor | None) -> Tensor | None:
    return x if x is None or x.dtype == torch.float32 else x.float()


def _row(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.float().contiguous()


def _register(name: str, backend: Backend, device_types: str | None) -> tuple[Any, Callable, Callable]:
    """Define the op multifire::NAME, differentiable and visible to torch.compile and torch.export.

    Returns:
        The op; its body as an autograd function, for direct calls with gradients; its body, for direct calls without.
    """

    def forward(
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        mean: Tensor | None,
        var: Tensor | None,
        add_before: Tensor | None,
        add_after: Tensor | None,
        state: Tensor | None,
        learned_thresholds: Tensor | None,
        learned_decay: Tensor | None,
        timesteps: int,
        training: bool,
        sync: bool,
        eps: float,
        scale: float,
        thresholds: Sequence[float],
        decay: float,
        surrogate: str,
        width: float,
        detach_reset: bool,
        reset: str,
        membranes: str,
        signed: bool,
        return_state: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Return spikes, state, and in training mean, variance and, with `sync`, the values per channel of x.

        Outputs that are not needed are empty. Evaluation uses the given mean and variance; without them, no norm.
        """
        outputs = _outputs(x, timesteps, training, sync, _rows(thresholds, membranes) if return_state else 0)
        out, new_state, own_mean, own_var, values = outputs
        call = Call(
            x, weight, bias, own_mean if mean is None else mean, own_var if var is None else var, add_before, add_after,
            state, learned_thresholds, learned_decay, timesteps, training, sync, eps, scale, thresholds, decay,
            surrogate, width, detach_reset, reset, membranes, signed,
        )  # fmt: skip
        saved_by_backend = backend.measure(call) if training else None
        if training and sync:
            collective.pool_statistics(own_mean, own_var, values.fill_(call.values))
        backend.forward(call, out, new_state if return_state else None, saved_by_backend)
        return outputs

    def fake_forward(
        x, weight, bias, mean, var, add_before, add_after, state, learned_thresholds, learned_decay, timesteps,
        training, sync, eps, scale, thresholds, decay, surrogate, width, detach_reset, reset, membranes, signed,
        return_state,
    ):  # fmt: skip
        return _outputs(x, timesteps, training, sync, _rows(thresholds, membranes) if return_state else 0)

    def backward(
        grad_out: Tensor | None,
        grad_state: Tensor | None,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        mean: Tensor,
        var: Tensor,
        add_before: Tensor | None,
        state: Tensor | None,
        learned_thresholds: Tensor | None,
        learned_decay: Tensor | None,
        timesteps: int,
        training: bool,
        sync: bool,
        eps: float,
        scale: float,
        thresholds: Sequence[float],
        decay: float,
        surrogate: str,
        width: float,
        detach_reset: bool,
        reset: str,
        membranes: str,
        signed: bool,
        needs: Sequence[bool],
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Return the gradients in the order of `Gradients`; all but that of x are empty unless `needs` is set."""
        grads = _gradients(x, timesteps, len(thresholds), _rows(thresholds, membranes), needs)
        saved = (x, weight, bias, mean, var, add_before, state, learned_thresholds, learned_decay)
        options = (
            timesteps, training, sync, eps, scale, thresholds, decay, surrogate, width, detach_reset,
            reset, membranes, signed,
        )  # fmt: skip
        fill(grads, needs, grad_out, grad_state, saved, options)
        return grads

    def fill(
        grads: Sequence[Tensor],
        needs: Sequence[bool],
        grad_out: Tensor | None,
        grad_state: Tensor | None,
        saved: Sequence[Any],
        options: Sequence[Any],
    ) -> None:
        x: Tensor = saved[0]
        _, weight, bias, mean, var, add_before, *rest = saved
        call = Call(x, weight, bias, mean, var, add_before, None, *rest, *options)
        if grad_out is None:
            grad_out = x.new_zeros(1).expand(call.timesteps, *x.shape[1:])
        if grad_state is not None and grad_state.numel() == 0:  # a compiled graph passes one for the empty state
            grad_state = None
        needed = (grad if need else None for grad, need in zip(grads[1:], needs, strict=True))
        filled = Gradients(grads[0], *needed)
        grad_sums = mean.new_empty((2, len(mean)), dtype=torch.float64)
        saved_by_backend = backend.backward(call, grad_out.to(x.dtype), grad_state, filled, grad_sums)
        if call.training:
            values = float(call.values)
            if call.sync:
                values = collective.pool_sums(grad_sums, values)
            backend.finish(call, filled, grad_sums, values, saved_by_backend)

    def fake_backward(
        grad_out, grad_state, x, weight, bias, mean, var, add_before, state, learned_thresholds, learned_decay,
        timesteps, training, sync, eps, scale, thresholds, decay, surrogate, width, detach_reset, reset, membranes,
        signed, needs,
    ):  # fmt: skip
        return _gradients(x, timesteps, len(thresholds), _rows(thresholds, membranes), needs)

    def setup_context(ctx, inputs, output) -> None:
        x, weight, bias, mean, var, add_before, _, state, learned_thresholds, learned_decay, *options, _ = inputs
        _, _, own_mean, own_var, values = output
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(own_mean, own_var, values)
        # Copies, since running statistics may be updated before the backward pass.
        mean, var = own_mean if mean is None else mean.clone(), own_var if var is None else var.clone()
        ctx.save_for_backward(x, weight, bias, mean, var, add_before, state, learned_thresholds, learned_decay)
        ctx.options = options

    def forward_eager(ctx, *inputs):
        output = forward(*inputs)
        setup_context(ctx, inputs, output)
        return output

    def differentiate(ctx, grad_out, grad_state, *_):
        saved = ctx.saved_tensors  # read once: torch.utils.checkpoint allows no second time
        need_x, need_weight, need_bias, _, _, need_before, need_after, *others = ctx.needs_input_grad
        need_state, need_thresholds, need_decay, *rest = others
        needs = [need_weight, need_bias, need_before, need_state, need_thresholds, need_decay]
        if _can_skip_dispatcher(saved[0], grad_out, grad_state):
            timesteps, _, _, _, _, thresholds, _, _, _, _, _, membranes, _ = ctx.options
            grads = _gradients(saved[0], timesteps, len(thresholds), _rows(thresholds, membranes), needs)
            fill(grads, needs, grad_out, grad_state, saved, ctx.options)
        else:
            grads = op_backward(grad_out, grad_state, *saved, *ctx.options, needs)
        grad_x, *others = grads
        grad_weight, grad_bias, grad_before, *grads_of_neuron = (
            grad if needed else None for grad, needed in zip(others, needs, strict=True)
        )
        return (
            grad_x if need_x else None, grad_weight, grad_bias, None, None, grad_before,
            grad_out if need_after else None, *grads_of_neuron, *[None] * len(rest),
        )  # fmt: skip

    def refuse(ctx, *_):
        raise NotImplementedError('the fused backends have no second derivatives; compute with backend="reference"')

    op = _define(name, forward, fake_forward, device_types, differentiate, setup_context)
    op_backward = _define(f"{name}_backward", backward, fake_backward, device_types, refuse)
    methods = {"forward": staticmethod(forward_eager), "backward": staticmethod(differentiate)}
    return op, type(f"multifire_{name}", (torch.autograd.Function,), methods).apply, forward


# Stored beside torch's ops, so that a reloaded module replaces its own ops.
_libraries: dict[str, torch.library.Library] = vars(torch.ops.multifire).setdefault("_libraries", {})


def _define(
    name: str,
    body: Callable,
    fake: Callable,
    device_types: str | None,
    differentiate: Callable,
    setup_context: Callable | None = None,
) -> Any:
    """Define the op multifire::NAME from an annotated function and a `fake` one, which returns unfilled outputs.

    It does what torch.library.custom_op does, without that function's checks in Python around every call.
    """
    _libraries.pop(name, None)
    library = _libraries[name] = torch.library.Library("multifire", "FRAGMENT")
    qualified = f"multifire::{name}"
    library.define(name + torch.library.infer_schema(body, mutates_args=()), tags=(torch.Tag.pt2_compliant_tag,))
    library.impl(name, body, "CompositeExplicitAutograd" if device_types is None else device_types.upper())
    torch.library.register_fake(qualified, fake, lib=library)
    torch.library.register_autograd(qualified, differentiate, setup_context=setup_context, lib=library)
    return getattr(torch.ops.multifire, name).default


def _empty(x: Tensor, leading: int, dtype: torch.dtype) -> Tensor:
    """Return an uninitialised tensor [leading, *x.shape[1:]] in the memory layout of x."""
    if not is_channels_last(x):
        return x.new_empty((leading, *x.shape[1:]), dtype=dtype)
    _, N, C, H, W = x.shape
    # Not a permuted view: autograd accumulates in place only into tensors that are no views.
    return x.new_empty_strided((leading, N, C, H, W), (N * H * W * C, H * W * C, 1, W * C, C), dtype=dtype)


def _rows(thresholds: Sequence[float], membranes: str) -> int:
    """Return the number of membranes of a neuron."""
    return 1 if membranes == "shared" else len(thresholds)


def _outputs(
    x: Tensor, timesteps: int, training: bool, sync: bool, rows: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the forward pass's outputs, to be filled; `rows` is the number of membranes to return."""
    channels = x.shape[2] if training else 0
    return (
        _empty(x, timesteps, x.dtype),
        _empty(x, rows, torch.float32) if rows else x.new_empty(0, dtype=torch.float32),
        x.new_empty(channels, dtype=torch.float32),
        x.new_empty(channels, dtype=torch.float32),
        x.new_empty(() if training and sync else 0, dtype=torch.float64),
    )


def _gradients(
    x: Tensor, timesteps: int, levels: int, rows: int, needs: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients, to be filled, in the order of `Gradients`."""
    need_weight, need_bias, need_before, need_state, need_thresholds, need_decay = needs
    nothing = (0,)

    def row(size: int | tuple[int, ...], needed: bool) -> Tensor:
        return x.new_empty(size if needed else nothing, dtype=torch.float32)

    return (
        _empty(x, x.shape[0], x.dtype),
        row(x.shape[2] if need_weight else 0, need_weight),
        row(x.shape[2] if need_bias else 0, need_bias),
        _empty(x, timesteps, x.dtype) if need_before else x.new_empty(nothing),
        _empty(x, rows, torch.float32) if need_state else row(nothing, False),
        row(levels, need_thresholds),
        row((), need_decay),
    )
