"""The fused CPU kernel (csrc/) as PyTorch ops; the definition of what it computes is reference.py.

Shapes: T time steps, K levels, N samples, C channels, H rows, W columns.
Source: Feng et al., "Multi-Level Firing with Spiking DS-ResNet", IJCAI 2022.
"""

import ctypes
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from multifire.ops import reference

MAX_LEVELS = 8
DTYPES = (torch.float32, torch.bfloat16)
SURROGATE_CODES = {name: code for code, name in enumerate(reference.SURROGATES)}
LIBRARY = Path(os.environ.get("MULTIFIRE_LIBRARY", Path(__file__).with_name("_mlf_cpu.so")))
NOT_BUILT = "it was not built when multifire was installed; install a C++ compiler, then multifire again"

_INTEGERS = (
    "timesteps", "outer", "channels", "inner", "shared_input", "bf16", "training", "threads",
    "levels", "surrogate", "detach_reset",
)  # fmt: skip
_FLOATS = ("decay", "width", "eps")
_POINTERS = (
    "x", "mean", "var", "factor", "weight", "bias", "add_before", "add_after", "state", "out", "state_out",
    "grad_out", "grad_state_out", "grad_x", "grad_add_before", "grad_weight", "grad_bias", "grad_state",
)  # fmt: skip


class Args(ctypes.Structure):
    """`Args` of csrc/mlf.h, field by field."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in _INTEGERS),
        *((name, ctypes.c_double) for name in _FLOATS),
        ("thresholds", ctypes.c_double * MAX_LEVELS),
        *((name, ctypes.c_void_p) for name in _POINTERS),
    )


def _load() -> ctypes.CDLL | None:
    """The compiled kernel. Loaded after torch, whose OpenMP runtime it then shares: two would fight over the cores."""
    if not LIBRARY.exists():
        return None
    library = ctypes.CDLL(str(LIBRARY))
    library.multifire_args_size.restype = ctypes.c_int64
    library.multifire_isa.restype = ctypes.c_char_p
    library.multifire_use_isa.restype = ctypes.c_bool
    library.multifire_pack.restype = ctypes.c_bool
    for name in ("multifire_pack", "multifire_unpack"):
        getattr(library, name).argtypes = [ctypes.c_void_p] * 2 + [ctypes.c_int64, ctypes.c_bool, ctypes.c_int64]
    assert library.multifire_args_size() == ctypes.sizeof(Args), "cpu.py and csrc/mlf.h disagree; reinstall multifire"
    return library


_LIBRARY = _load()


def is_built() -> bool:
    """Whether a C++ compiler was there when the package was installed."""
    return _LIBRARY is not None


def why_not(x: Tensor, levels: int) -> str | None:
    """Why the kernel cannot compute for `x` with so many levels, or None where it can."""
    if not is_built():
        return NOT_BUILT
    if x.device.type != "cpu":
        return f"x lies on {x.device.type}"
    if x.dtype not in DTYPES:
        return f"x is of {x.dtype}, expected float32 or bfloat16"
    if levels > MAX_LEVELS:
        return f"{levels} levels, expected at most {MAX_LEVELS}"
    return None


def isa() -> str:
    """The build in use: avx512_bf16, avx512, avx2 or portable, at first the widest that the processor runs."""
    assert _LIBRARY is not None
    return _LIBRARY.multifire_isa().decode()


def use_isa(name: str) -> None:
    """Take the build for that instruction set from now on.

    Raises:
        ValueError: there is none, or the processor lacks it.
    """
    assert _LIBRARY is not None
    if not _LIBRARY.multifire_use_isa(name.encode()):
        raise ValueError(
            f"no build of the CPU kernel for {name!r} runs here, expected avx512_bf16, avx512, avx2 or portable"
        )


if _LIBRARY is not None and "MULTIFIRE_ISA" in os.environ:
    use_isa(os.environ["MULTIFIRE_ISA"])


def mlf(
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
    out, new_state, _, _ = fused(
        x, None, None, None, None, None, None, _float(state), x.shape[0], False, 0.0, 1.0,
        thresholds, decay, surrogate, width, detach_reset, True,
    )  # fmt: skip
    return out, new_state


def tdbn(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    *,
    training: bool,
    momentum: float,
    eps: float,
    scale: float,
) -> Tensor:
    """Threshold-dependent batch norm, computed and returned in fp32: the kernel with no levels."""
    return tdbn_mlf(
        x.float(), weight, bias, running_mean, running_var, training=training, momentum=momentum, eps=eps, scale=scale,
        thresholds=(), decay=0.0, surrogate="rect", width=1.0, detach_reset=False,
        add_before=None, add_after=None, state=None, return_state=False, timesteps=x.shape[0],
    )[0]  # fmt: skip


def tdbn_mlf(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    *,
    training: bool,
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
    dtype = x.dtype
    if any(add is not None and add.dtype != dtype for add in (add_before, add_after)):
        x, add_before, add_after = x.float(), _float(add_before), _float(add_after)
    out, new_state, mean, var = fused(
        x, _float(weight), _float(bias),
        None if training else running_mean.float(), None if training else running_var.float(),
        add_before, add_after, _float(state), timesteps, training, eps, scale,
        thresholds, decay, surrogate, width, detach_reset, return_state,
    )  # fmt: skip
    if training:
        values = timesteps * x[0].numel() // x.shape[2]
        reference.move_running(running_mean, running_var, mean, var, values, momentum)
    return out.to(dtype), new_state if return_state else None


def _float(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.float()


@torch.library.custom_op("multifire::tdbn_mlf", mutates_args=(), device_types="cpu")
def fused(
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
    eps: float,
    scale: float,
    thresholds: Sequence[float],
    decay: float,
    surrogate: str,
    width: float,
    detach_reset: bool,
    return_state: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Spikes, state, mean and variance; the last three empty where they are not computed.

    Training takes the mean and variance of x itself, evaluation those given; neither means no norm. An x of one time
    step stands for `timesteps` equal ones.
    """
    norm, order = training or mean is not None, _is_channels_last(x)
    out, new_state, batch_mean, batch_var = _outputs(x, mean, timesteps, training, thresholds, return_state)
    kept = _Kept()
    args = _args(kept, x, weight, bias, add_before, state, timesteps, norm, training, eps,
                 thresholds, decay, surrogate, width, detach_reset)  # fmt: skip
    args.add_after = kept.pointer(add_after, order)
    args.out = out.data_ptr()
    args.state_out = new_state.data_ptr() if return_state else None
    assert _LIBRARY is not None
    if mean is not None and var is not None:
        batch_mean.copy_(mean)
        batch_var.copy_(var)
    if norm:
        args.mean, args.var = batch_mean.data_ptr(), batch_var.data_ptr()
    if training:
        _LIBRARY.multifire_stats(ctypes.byref(args))
    if norm:
        args.factor = kept.pointer(reference.norm_factor(batch_var, eps, scale), False)
    _LIBRARY.multifire_forward(ctypes.byref(args))
    return out, new_state, batch_mean, batch_var


@fused.register_fake
def _(
    x, weight, bias, mean, var, add_before, add_after, state, timesteps, training, eps, scale,
    thresholds, decay, surrogate, width, detach_reset, return_state,
):  # fmt: skip
    return _outputs(x, mean, timesteps, training, thresholds, return_state)


@torch.library.custom_op("multifire::tdbn_mlf_backward", mutates_args=(), device_types="cpu")
def fused_backward(
    grad_out: Tensor | None,
    grad_state_out: Tensor | None,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    add_before: Tensor | None,
    state: Tensor | None,
    timesteps: int,
    training: bool,
    eps: float,
    scale: float,
    thresholds: Sequence[float],
    decay: float,
    surrogate: str,
    width: float,
    detach_reset: bool,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weight, bias, add_before and state; the last four empty where `needs` says no."""
    order, norm = _is_channels_last(x), mean.numel() > 0
    grads = _gradients(x, timesteps, thresholds, needs)
    kept = _Kept()
    args = _args(kept, x, weight, bias, add_before, state, timesteps, norm, training, eps,
                 thresholds, decay, surrogate, width, detach_reset)  # fmt: skip
    if norm:
        args.mean, args.var = mean.data_ptr(), var.data_ptr()
        args.factor = kept.pointer(reference.norm_factor(var, eps, scale), False)
    if grad_out is None:
        grad_out = x.new_zeros(1).expand(timesteps, *x.shape[1:])
    args.grad_out = kept.pointer(grad_out.to(x.dtype), order)
    if grad_state_out is not None and grad_state_out.numel() > 0:  # a compiled graph passes the empty state's gradient
        args.grad_state_out = kept.pointer(grad_state_out.float(), order)
    args.grad_x = grads[0].data_ptr()
    for name, grad, needed in zip(("weight", "bias", "add_before", "state"), grads[1:], needs, strict=True):
        if needed:
            setattr(args, f"grad_{name}", grad.data_ptr())
    assert _LIBRARY is not None
    _LIBRARY.multifire_backward(ctypes.byref(args))
    return grads


@fused_backward.register_fake
def _(
    grad_out, grad_state_out, x, weight, bias, mean, var, add_before, state, timesteps, training, eps, scale,
    thresholds, decay, surrogate, width, detach_reset, needs,
):  # fmt: skip
    return _gradients(x, timesteps, thresholds, needs)


def _setup_context(ctx, inputs, output) -> None:
    x, weight, bias, _, _, add_before, _, state, *options, _ = inputs
    _, _, mean, var = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(mean, var)
    ctx.save_for_backward(x, weight, bias, mean, var, add_before, state)
    ctx.options = options


def _backward(ctx, grad_out, grad_state, grad_mean, grad_var):
    need_x, need_weight, need_bias, _, _, need_before, need_after, need_state, *rest = ctx.needs_input_grad
    needs = [need_weight, need_bias, need_before, need_state]
    grad_x, *others = torch.ops.multifire.tdbn_mlf_backward(
        grad_out, grad_state, *ctx.saved_tensors, *ctx.options, needs
    )
    grad_weight, grad_bias, grad_before, grad_initial = (
        grad if needed else None for grad, needed in zip(others, needs, strict=True)
    )
    return (
        grad_x if need_x else None, grad_weight, grad_bias, None, None, grad_before,
        grad_out if need_after else None, grad_initial, *[None] * len(rest),
    )  # fmt: skip


def pack(spikes: Tensor) -> Tensor | None:
    """Integers 0..255 as bytes, in the same memory order; None where some value is none."""
    assert _LIBRARY is not None
    packed = torch.empty_like(spikes, dtype=torch.uint8)
    half, threads = spikes.dtype == torch.bfloat16, torch.get_num_threads()
    exact = _LIBRARY.multifire_pack(spikes.data_ptr(), packed.data_ptr(), spikes.numel(), half, threads)
    return packed if exact else None


def unpack(packed: Tensor, dtype: torch.dtype) -> Tensor:
    """The spikes that `pack` packed."""
    assert _LIBRARY is not None
    spikes = torch.empty_like(packed, dtype=dtype)
    half, threads = dtype == torch.bfloat16, torch.get_num_threads()
    _LIBRARY.multifire_unpack(packed.data_ptr(), spikes.data_ptr(), packed.numel(), half, threads)
    return spikes


fused.register_autograd(_backward, setup_context=_setup_context)


class _Kept:
    """Keeps the tensors alive whose addresses went into a call, and puts them into the call's memory order first."""

    def __init__(self):
        self._tensors: list[Tensor] = []

    def pointer(self, x: Tensor | None, channels_last: bool) -> int | None:
        if x is None:
            return None
        ordered = (x.permute(0, 1, 3, 4, 2) if channels_last else x).contiguous()
        self._tensors.append(ordered)
        return ordered.data_ptr()


def _args(
    kept, x, weight, bias, add_before, state, timesteps, norm, training, eps,
    thresholds, decay, surrogate, width, detach_reset,
) -> Args:  # fmt: skip
    """What forward and backward have in common."""
    order = _is_channels_last(x)
    step = x[0].numel()
    channels = x.shape[2] if norm else 1
    inner = x.shape[3] * x.shape[4] if norm and not order else 1
    return Args(
        timesteps=timesteps,
        outer=step // max(1, channels * inner),
        channels=channels,
        inner=inner,
        shared_input=x.shape[0] < timesteps,
        bf16=x.dtype == torch.bfloat16,
        training=training,
        threads=torch.get_num_threads(),
        levels=len(thresholds),
        surrogate=SURROGATE_CODES[surrogate],
        detach_reset=detach_reset,
        decay=decay,
        width=width,
        eps=eps,
        thresholds=(ctypes.c_double * MAX_LEVELS)(*thresholds),
        x=kept.pointer(x, order),
        weight=kept.pointer(weight, False),
        bias=kept.pointer(bias, False),
        add_before=kept.pointer(add_before, order),
        state=kept.pointer(state, order),
    )


def _is_channels_last(x: Tensor) -> bool:
    """The memory order to compute in: x's own, where it is one of the two that the kernel knows."""
    return x.dim() == 5 and not x.is_contiguous() and x.stride(2) == 1


def _empty(x: Tensor, leading: int, dtype: torch.dtype) -> Tensor:
    """An uninitialised tensor [leading, ...] like x, in the memory order of the call."""
    if not _is_channels_last(x):
        return x.new_empty((leading, *x.shape[1:]), dtype=dtype)
    _, N, C, H, W = x.shape
    return x.new_empty((leading, N, H, W, C), dtype=dtype).permute(0, 1, 4, 2, 3)


def _outputs(
    x: Tensor, mean: Tensor | None, timesteps: int, training: bool, thresholds: Sequence[float], return_state: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    channels = x.shape[2] if training or mean is not None else 0
    state = _empty(x, len(thresholds), torch.float32) if return_state else x.new_empty(0, dtype=torch.float32)
    return (
        _empty(x, timesteps, x.dtype),
        state,
        x.new_empty(channels, dtype=torch.float32),
        x.new_empty(channels, dtype=torch.float32),
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
