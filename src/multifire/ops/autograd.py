"""What the fused backends share: a custom op each, its shapes while tracing, its gradients, and the functions over it.

A backend brings four functions that fill tensors, see `Backend`; between them statistics are summed over processes,
where a call asks for it. What they compute is defined in reference.py.

Shapes: T time steps, K levels, N samples, C channels, H rows, W columns.
"""

from collections.abc import Callable, Sequence
from types import NoneType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from multifire.ops import collective, reference


class Call(NamedTuple):
    """The arguments of one call. An x of one time step stands for `timesteps` equal ones."""

    x: Tensor
    weight: Tensor | None
    bias: Tensor | None
    mean: Tensor
    """Mean and variance [C] of the norm, contiguous; empty where there is none; to be filled forward in training."""
    var: Tensor
    add_before: Tensor | None
    add_after: Tensor | None
    state: Tensor | None
    timesteps: int
    training: bool
    sync: bool
    """Whether the statistics are those of all processes' samples."""
    eps: float
    scale: float
    thresholds: Sequence[float]
    """No threshold: the norm alone."""
    decay: float
    surrogate: str
    width: float
    detach_reset: bool

    @property
    def norm(self) -> bool:
        return self.mean.numel() > 0

    @property
    def is_static(self) -> bool:
        """Whether x holds one time step, which stands for all."""
        return self.x.shape[0] < self.timesteps

    @property
    def channels_last(self) -> bool:
        return is_channels_last(self.x)

    @property
    def values(self) -> int:
        """Values per channel of this process's x, with a still x counted at each of its time steps."""
        return self.timesteps * self.x.shape[1] * self.x.shape[3] * self.x.shape[4]


class Gradients(NamedTuple):
    """Tensors to be filled, x first; None where nobody asks for them."""

    x: Tensor
    weight: Tensor | None
    bias: Tensor | None
    add_before: Tensor | None
    state: Tensor | None


class Backend(NamedTuple):
    """The four passes over the data that make a fused backend, and what moves a norm's running statistics."""

    measure: Callable[[Call], Any]
    """Fills the call's mean and variance with those of its x, or without `sync` may leave it to `forward`."""
    forward: Callable[[Call, Tensor, Tensor | None, Any], None]
    """Fills out [T, N, C, H, W] and, if asked for, the state [K, N, C, H, W], given what `measure` returned."""
    backward: Callable[[Call, Tensor, Tensor | None, Gradients, Tensor], Any]
    """Fills the gradients, given those of out and, if there is one, of the state; and sums [2, C] float64 with Σ dy and
    Σ dy·(x - μ), where there is a norm. In training it may leave that of x to `finish`, and with `sync` must, which is
    given what this returns."""
    finish: Callable[[Call, Gradients, Tensor, float, Any], None]
    """In training: fills the gradient of x, given the sums, and over how many values per channel they are."""
    move_running: Callable[[Tensor, Tensor, Tensor, Tensor, int | Tensor, float], None] = reference.move_running
    """As the reference's. Called where nothing looks at torch's ops."""


class FusedOps:
    """`mlf`, `tdbn` and `tdbn_mlf` of the reference's signatures, over a backend."""

    def __init__(self, name: str, backend: Backend, device_types: str | None):
        self._op, self._eager, self._body = _register(name, backend, device_types)
        self._move_running = backend.move_running

    def _run(self, x: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """The op. Where nothing looks at ops, its body is called without torch's dispatcher.

        The way through it costs 0.2 to 0.5 ms a call between convolutions, which leave nothing of it in the caches.
        """
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
    ) -> tuple[Tensor, Tensor]:
        """Multi-level firing over time; see `multifire.ops.mlf`."""
        _refuse_tangents(x, state)
        out, last, *_ = self._run(
            x, None, None, None, None, None, None, _float(state), x.shape[0], False, False, 0.0, 1.0,
            thresholds, decay, surrogate, width, detach_reset, True,
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
        """Threshold-dependent batch norm, computed and returned in fp32: the kernel with no levels."""
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
    ) -> tuple[Tensor, Tensor | None]:
        """Norm, sum, firing, sum; see `multifire.ops.tdbn_mlf`."""
        _refuse_tangents(x, weight, bias, add_before, add_after, state)
        dtype = x.dtype
        if any(add is not None and add.dtype != dtype for add in (add_before, add_after)):
            x, add_before, add_after = x.float(), _float(add_before), _float(add_after)
        out, new_state, mean, var, values = self._run(
            x, _float(weight), _float(bias),
            None if training else _row(running_mean), None if training else _row(running_var),
            add_before, add_after, _float(state), timesteps, training, sync, eps, scale,
            thresholds, decay, surrogate, width, detach_reset, return_state,
        )  # fmt: skip
        if training and running_mean is not None and running_var is not None:
            n = values if sync else timesteps * x.shape[1] * x.shape[3] * x.shape[4]
            needs_dispatcher = _needs_dispatcher(x, running_mean, running_var)
            move = reference.move_running if needs_dispatcher else self._move_running
            move(running_mean, running_var, mean, var, n, momentum)
        return out.to(dtype), new_state if return_state else None


TENSORS = 7
"""Arguments after x that are tensors or None."""


def _needs_dispatcher(*tensors: Tensor | None) -> bool:
    """Whether something records, replaces or transforms the ops that are called with them."""
    return (
        torch.compiler.is_compiling()
        or any(type(x) not in (Tensor, nn.Parameter, NoneType) for x in tensors)
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._are_functorch_transforms_active()
        or torch.jit.is_tracing()
    )


def _can_skip_dispatcher(x: Tensor, *grads: Tensor | None) -> bool:
    """Whether a backward pass may go without the op, which takes batched gradients and refuses second derivatives."""
    batched = any(g is not None and torch._C._functorch.is_legacy_batchedtensor(g) for g in grads)  # pyright: ignore[reportAttributeAccessIssue]
    return not (batched or torch.is_grad_enabled() or _needs_dispatcher(x))


def _refuse_tangents(*tensors: Tensor | None) -> None:
    """torch would lose them at a custom op without a word, and a derivative come out as zero."""
    if torch.compiler.is_compiling():  # which has no forward mode
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
    """The op multifire::NAME, differentiable, and visible to torch.compile and torch.export; its body with gradients,
    and without, both called directly.
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
        return_state: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Spikes, and the state if it is asked for; in training the mean and variance of x; with `sync` their values.

        What is not asked for is empty. Evaluation takes the mean and variance given; neither means no norm.
        """
        outputs = _outputs(x, timesteps, training, sync, thresholds, return_state)
        out, new_state, own_mean, own_var, values = outputs
        call = Call(
            x, weight, bias, own_mean if mean is None else mean, own_var if var is None else var, add_before, add_after,
            state, timesteps, training, sync, eps, scale, thresholds, decay, surrogate, width, detach_reset,
        )  # fmt: skip
        saved_by_backend = backend.measure(call) if training else None
        if training and sync:
            collective.pool_statistics(own_mean, own_var, values.fill_(call.values))
        backend.forward(call, out, new_state if return_state else None, saved_by_backend)
        return outputs

    def fake_forward(
        x, weight, bias, mean, var, add_before, add_after, state, timesteps, training, sync, eps, scale,
        thresholds, decay, surrogate, width, detach_reset, return_state,
    ):  # fmt: skip
        return _outputs(x, timesteps, training, sync, thresholds, return_state)

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
        needs: Sequence[bool],
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Gradients of x, weight, bias, add_before and state; empty where `needs` says no of the last four."""
        grads = _gradients(x, timesteps, thresholds, needs)
        saved = (x, weight, bias, mean, var, add_before, state)
        options = (timesteps, training, sync, eps, scale, thresholds, decay, surrogate, width, detach_reset)
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
        _, weight, bias, mean, var, add_before, state = saved
        call = Call(x, weight, bias, mean, var, add_before, None, state, *options)
        if grad_out is None:
            grad_out = x.new_zeros(1).expand(call.timesteps, *x.shape[1:])
        if grad_state is not None and grad_state.numel() == 0:  # a compiled graph passes the empty state's gradient
            grad_state = None
        needed = (grad if need else None for grad, need in zip(grads[1:], needs, strict=True))
        filled = Gradients(grads[0], *needed)
        sums = mean.new_empty((2, len(mean)), dtype=torch.float64)
        saved_by_backend = backend.backward(call, grad_out.to(x.dtype), grad_state, filled, sums)
        if call.training:
            values = float(call.values)
            if call.sync:
                values = collective.pool_sums(sums, values)
            backend.finish(call, filled, sums, values, saved_by_backend)

    def fake_backward(
        grad_out, grad_state, x, weight, bias, mean, var, add_before, state, timesteps, training, sync, eps, scale,
        thresholds, decay, surrogate, width, detach_reset, needs,
    ):  # fmt: skip
        return _gradients(x, timesteps, thresholds, needs)

    def setup_context(ctx, inputs, output) -> None:
        x, weight, bias, mean, var, add_before, _, state, *options, _ = inputs
        _, _, own_mean, own_var, values = output
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(own_mean, own_var, values)
        # Running statistics may move before the gradients are asked for, hence the copies.
        mean, var = own_mean if mean is None else mean.clone(), own_var if var is None else var.clone()
        ctx.save_for_backward(x, weight, bias, mean, var, add_before, state)
        ctx.options = options

    def forward_eager(ctx, *inputs):
        output = forward(*inputs)
        setup_context(ctx, inputs, output)
        return output

    def differentiate(ctx, grad_out, grad_state, *_):
        saved = ctx.saved_tensors  # once: a checkpoint refuses a second time
        need_x, need_weight, need_bias, _, _, need_before, need_after, need_state, *rest = ctx.needs_input_grad
        needs = [need_weight, need_bias, need_before, need_state]
        if _can_skip_dispatcher(saved[0], grad_out, grad_state):
            timesteps, *_, thresholds = ctx.options[:6]
            grads = _gradients(saved[0], timesteps, thresholds, needs)
            fill(grads, needs, grad_out, grad_state, saved, ctx.options)
        else:
            grads = op_backward(grad_out, grad_state, *saved, *ctx.options, needs)
        grad_x, *others = grads
        grad_weight, grad_bias, grad_before, grad_initial = (
            grad if needed else None for grad, needed in zip(others, needs, strict=True)
        )
        return (
            grad_x if need_x else None, grad_weight, grad_bias, None, None, grad_before,
            grad_out if need_after else None, grad_initial, *[None] * len(rest),
        )  # fmt: skip

    def refuse(ctx, *_):
        raise NotImplementedError('the fused backends have no second derivatives; compute with backend="reference"')

    op = _define(name, forward, fake_forward, device_types, differentiate, setup_context)
    op_backward = _define(f"{name}_backward", backward, fake_backward, device_types, refuse)
    methods = {"forward": staticmethod(forward_eager), "backward": staticmethod(differentiate)}
    return op, type(f"multifire_{name}", (torch.autograd.Function,), methods).apply, forward


# Kept where torch keeps the ops, so that a module that is loaded again replaces its own.
_libraries: dict[str, torch.library.Library] = vars(torch.ops.multifire).setdefault("_libraries", {})


def _define(
    name: str,
    body: Callable,
    fake: Callable,
    device_types: str | None,
    differentiate: Callable,
    setup_context: Callable | None = None,
) -> Any:
    """The op multifire::NAME of an annotated function; `fake` gives what it returns, unfilled.

    These are torch.library.custom_op's own parts, without the checks in Python that it wraps around every call.
    """
    _libraries.pop(name, None)
    library = _libraries[name] = torch.library.Library("multifire", "FRAGMENT")
    qualified = f"multifire::{name}"
    library.define(name + torch.library.infer_schema(body, mutates_args=()), tags=(torch.Tag.pt2_compliant_tag,))
    library.impl(name, body, "CompositeExplicitAutograd" if device_types is None else device_types.upper())
    torch.library.register_fake(qualified, fake, lib=library)
    torch.library.register_autograd(qualified, differentiate, setup_context=setup_context, lib=library)
    return getattr(torch.ops.multifire, name).default


def is_channels_last(x: Tensor) -> bool:
    """The memory order to compute in: x's own, where it is one of the two that kernels know."""
    return x.dim() == 5 and not x.is_contiguous() and x.stride(2) == 1


def to_layout(x: Tensor, channels_last: bool) -> Tensor:
    """x, copied where it is not in that memory order, as a contiguous tensor [.., H, W, C] or [.., C, H, W]."""
    return (x.permute(0, 1, 3, 4, 2) if channels_last else x).contiguous()


def _empty(x: Tensor, leading: int, dtype: torch.dtype) -> Tensor:
    """An uninitialised tensor [leading, ...] like x, in the memory order of the call."""
    if not is_channels_last(x):
        return x.new_empty((leading, *x.shape[1:]), dtype=dtype)
    _, N, C, H, W = x.shape
    # No view of another order, for autograd adds in place only to tensors of their own.
    return x.new_empty_strided((leading, N, C, H, W), (N * H * W * C, H * W * C, 1, W * C, C), dtype=dtype)


def _outputs(
    x: Tensor, timesteps: int, training: bool, sync: bool, thresholds: Sequence[float], return_state: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    channels = x.shape[2] if training else 0
    return (
        _empty(x, timesteps, x.dtype),
        _empty(x, len(thresholds), torch.float32) if return_state else x.new_empty(0, dtype=torch.float32),
        x.new_empty(channels, dtype=torch.float32),
        x.new_empty(channels, dtype=torch.float32),
        x.new_empty(() if training and sync else 0, dtype=torch.float64),
    )


def _gradients(
    x: Tensor, timesteps: int, thresholds: Sequence[float], needs: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    need_weight, need_bias, need_before, need_state = needs
    nothing = (0,)
    return (
        _empty(x, x.shape[0], x.dtype),
        x.new_empty(x.shape[2] if need_weight else nothing, dtype=torch.float32),
        x.new_empty(x.shape[2] if need_bias else nothing, dtype=torch.float32),
        _empty(x, timesteps, x.dtype) if need_before else x.new_empty(nothing),
        _empty(x, len(thresholds), torch.float32) if need_state else x.new_empty(nothing, dtype=torch.float32),
    )
