"""The fused CPU kernel (csrc/) as PyTorch ops; reference.py defines what it computes.

Shapes: T time steps, K levels, N samples, C channels, H rows, W columns.
Source: Feng et al., "Multi-Level Firing with Spiking DS-ResNet", IJCAI 2022.
"""

import ctypes
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from multifire.config import neurons
from multifire.ops import reference
from multifire.ops.autograd import FusedOps
from multifire.ops.call import Backend, Call, Gradients, to_layout

MAX_LEVELS = 8
DTYPES = (torch.float32, torch.bfloat16)
SURROGATE_CODES = {name: code for code, name in enumerate(neurons.SURROGATES)}
LIBRARY = Path(os.environ.get("MULTIFIRE_LIBRARY", Path(__file__).with_name("_mlf_cpu.so")))
NOT_BUILT = "it was not built when multifire was installed; install a C++ compiler, then multifire again"

_INTEGERS = (
    "timesteps", "outer", "channels", "inner", "static_input", "bf16", "training", "threads",
    "levels", "surrogate", "detach_reset", "shared_membrane", "subtract", "signed_levels", "learned",
)  # fmt: skip
_FLOATS = ("decay", "width", "eps", "scale")
_POINTERS = (
    "x", "mean", "var", "weight", "bias", "add_before", "add_after", "state", "out", "state_out",
    "grad_out", "grad_state_out", "grad_x", "grad_add_before", "grad_weight", "grad_bias", "grad_state",
    "grad_thresholds", "grad_decay", "sums",
)  # fmt: skip
_FIRE_INTEGERS = (
    "timesteps", "values", "channels", "bias_period", "static_input", "levels", "threads",
    "shared_membrane", "subtract",
)  # fmt: skip
_FIRE_POINTERS = ("sums", "scale", "bias", "add_after", "state", "out", "state_out")


class Args(ctypes.Structure):
    """`Args` of csrc/mlf.h, with the same fields in the same order."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in _INTEGERS),
        *((name, ctypes.c_double) for name in _FLOATS),
        ("thresholds", ctypes.c_double * MAX_LEVELS),
        *((name, ctypes.c_void_p) for name in _POINTERS),
        ("values", ctypes.c_double),
    )


class FireArgs(ctypes.Structure):
    """`FireArgs` of csrc/mlf.h, with the same fields in the same order."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in _FIRE_INTEGERS),
        ("decay", ctypes.c_double),
        ("thresholds", ctypes.c_double * MAX_LEVELS),
        *((name, ctypes.c_void_p) for name in _FIRE_POINTERS),
    )


def _load() -> ctypes.CDLL | None:
    """Load the compiled kernel; after torch, so that both share one OpenMP runtime."""
    if not LIBRARY.exists():
        return None
    library = ctypes.CDLL(str(LIBRARY))
    assert hasattr(library, "multifire_move_running"), f"{LIBRARY} is of an older multifire; reinstall it"
    for name in ("multifire_args_size", "multifire_fire_args_size"):
        getattr(library, name).restype = ctypes.c_int64
    library.multifire_isa.restype = ctypes.c_char_p
    library.multifire_use_isa.restype = ctypes.c_bool
    library.multifire_move_running.argtypes = [
        *[ctypes.c_void_p] * 4, ctypes.c_int64, ctypes.c_double, ctypes.c_double,
    ]  # fmt: skip
    library.multifire_pack.restype = ctypes.c_bool
    for name in ("multifire_pack", "multifire_unpack"):
        getattr(library, name).argtypes = [ctypes.c_void_p] * 2 + [ctypes.c_int64] * 2 + [ctypes.c_bool, ctypes.c_int64]
    sizes = library.multifire_args_size(), library.multifire_fire_args_size()
    assert sizes == (ctypes.sizeof(Args), ctypes.sizeof(FireArgs)), (
        "cpu.py and csrc/mlf.h disagree; reinstall multifire"
    )
    return library


_LIBRARY = _load()


def is_built() -> bool:
    """Return True if the kernel was compiled when the package was installed."""
    return _LIBRARY is not None


def why_not(x: Tensor, levels: int) -> str | None:
    """Return the reason why the kernel cannot compute for `x` and K = levels, or None if it can."""
    if not is_built():
        return NOT_BUILT
    if not x.is_cpu:
        return f"x lies on {x.device.type}"
    if x.dtype not in DTYPES:
        return f"x is of {x.dtype}, expected float32 or bfloat16"
    if levels > MAX_LEVELS:
        return f"{levels} levels, expected at most {MAX_LEVELS}"
    return None


def isa() -> str:
    """Return the build in use: avx512_bf16, avx512, avx2 or portable; by default the widest that the processor runs."""
    assert _LIBRARY is not None
    return _LIBRARY.multifire_isa().decode()


def use_isa(name: str) -> None:
    """Use the build for this instruction set from now on.

    Raises:
        ValueError: no such build, or the processor lacks the instructions.
    """
    assert _LIBRARY is not None
    if not _LIBRARY.multifire_use_isa(name.encode()):
        raise ValueError(
            f"no build of the CPU kernel for {name!r} runs here, expected avx512_bf16, avx512, avx2 or portable"
        )


if _LIBRARY is not None and "MULTIFIRE_ISA" in os.environ:
    use_isa(os.environ["MULTIFIRE_ISA"])


class _Kept:
    """Keeps tensors alive while the kernel uses their addresses, in the memory layout of the call."""

    def __init__(self):
        self._tensors: list[Tensor] = []

    def pointer(self, x: Tensor | None, channels_last: bool) -> int | None:
        if x is None:
            return None
        if not x.is_cpu:
            raise ValueError(f"a tensor lies on {x.device}, expected on the CPU, where x lies")
        self._tensors.append(to_layout(x, channels_last))
        return self._tensors[-1].data_ptr()


def _measure(call: Call) -> tuple[_Kept, Args]:
    assert _LIBRARY is not None
    kept, args = _args(call)
    if call.x.numel() > 0:  # a process may have no samples in this batch
        _LIBRARY.multifire_stats(ctypes.byref(args))
    return kept, args


def _forward(call: Call, out: Tensor, state: Tensor | None, saved: tuple[_Kept, Args] | None) -> None:
    assert _LIBRARY is not None
    kept, args = saved or _args(call)
    args.add_after = kept.pointer(call.add_after, call.channels_last)
    args.out, args.state_out = out.data_ptr(), None if state is None else state.data_ptr()
    _LIBRARY.multifire_forward(ctypes.byref(args))


def _backward(
    call: Call, grad_out: Tensor, grad_state: Tensor | None, grads: Gradients, grad_sums: Tensor
) -> tuple[_Kept, Args]:
    assert _LIBRARY is not None
    kept, args = _args(call)
    if call.norm:
        args.sums = grad_sums.data_ptr()
    args.grad_out = kept.pointer(grad_out, call.channels_last)
    if grad_state is not None:
        args.grad_state_out = kept.pointer(grad_state.float(), call.channels_last)
    for name, grad in grads._asdict().items():
        if grad is not None:
            setattr(args, f"grad_{name.removeprefix('learned_')}", grad.data_ptr())
    args.learned = grads.learned_thresholds is not None or grads.learned_decay is not None
    _LIBRARY.multifire_backward(ctypes.byref(args))
    return kept, args


def _finish(call: Call, grads: Gradients, grad_sums: Tensor, values: float, saved: tuple[_Kept, Args]) -> None:
    assert _LIBRARY is not None
    _, args = saved
    args.values = values
    _LIBRARY.multifire_finish(ctypes.byref(args))


def _move_running(
    running_mean: Tensor, running_var: Tensor, mean: Tensor, var: Tensor, values: int | Tensor, momentum: float
) -> None:
    assert _LIBRARY is not None
    running = (running_mean, running_var)
    if isinstance(values, Tensor) or any(
        not r.is_cpu or r.dtype != torch.float32 or not r.is_contiguous() for r in running
    ):
        reference.move_running(*running, mean, var, values, momentum)
        return
    tensors = (*running, mean, var)
    unbias = values / (values - 1)
    _LIBRARY.multifire_move_running(*(x.data_ptr() for x in tensors), mean.numel(), unbias, momentum)
    torch.autograd.graph.increment_version(running)


_backend = Backend(_measure, _forward, _backward, _finish, _move_running)
_ops = FusedOps("tdbn_mlf_cpu", _backend, device_types="cpu")
mlf, tdbn, tdbn_mlf = _ops.mlf, _ops.tdbn, _ops.tdbn_mlf


def _args(call: Call) -> tuple[_Kept, Args]:
    """Return the arguments that all passes share."""
    kept, x, order = _Kept(), call.x, call.channels_last
    step = math.prod(x.shape[1:])
    channels = x.shape[2] if call.norm else 1
    inner = x.shape[3] * x.shape[4] if call.norm and not order else 1
    return kept, Args(
        timesteps=call.timesteps,
        outer=step // max(1, channels * inner),
        channels=channels,
        inner=inner,
        static_input=call.is_static,
        bf16=x.dtype == torch.bfloat16,
        training=call.training,
        threads=torch.get_num_threads(),
        levels=len(call.thresholds),
        surrogate=SURROGATE_CODES[call.surrogate],
        detach_reset=call.detach_reset,
        shared_membrane=call.membranes == "shared",
        subtract=call.reset == "subtract",
        signed_levels=call.signed,
        decay=_number(call.learned_decay, call.decay),
        width=call.width,
        eps=call.eps,
        scale=call.scale,
        thresholds=(ctypes.c_double * MAX_LEVELS)(*_number(call.learned_thresholds, call.thresholds)),
        mean=kept.pointer(call.mean, False) if call.norm else None,
        var=kept.pointer(call.var, False) if call.norm else None,
        x=kept.pointer(x, order),
        weight=kept.pointer(call.weight, False),
        bias=kept.pointer(call.bias, False),
        add_before=kept.pointer(call.add_before, order),
        state=kept.pointer(call.state, order),
    )


def _number(learned: Tensor | None, constant: Any) -> Any:
    """Return the numbers that a learned tensor holds, or without one the constant."""
    if learned is None:
        return constant
    if not learned.is_cpu:
        raise ValueError(f"learned thresholds or decay lie on {learned.device}, expected on the CPU, where x lies")
    return learned.tolist()


BITS = (2, 4, 8)
_GROUP = 16  # kGroup of csrc/packing.h


def pack(spikes: Tensor, bits: int) -> Tensor | None:
    """Pack integers below 2^bits, 8/bits in a byte, in memory order; return None if a value is no such integer."""
    assert _LIBRARY is not None
    blocks = -(-spikes.numel() * bits // (8 * _GROUP))
    packed = spikes.new_empty(blocks * _GROUP, dtype=torch.uint8)
    half, threads = spikes.dtype == torch.bfloat16, torch.get_num_threads()
    exact = _LIBRARY.multifire_pack(spikes.data_ptr(), packed.data_ptr(), spikes.numel(), bits, half, threads)
    return packed if exact else None


def unpack(packed: Tensor, bits: int, spikes: Tensor) -> None:
    """Fill `spikes`, a tensor with the shape and memory layout of the packed one."""
    assert _LIBRARY is not None
    half, threads = spikes.dtype == torch.bfloat16, torch.get_num_threads()
    _LIBRARY.multifire_unpack(packed.data_ptr(), spikes.data_ptr(), spikes.numel(), bits, half, threads)


def mlf_uint8(
    sums: Tensor,
    scale: Tensor,
    bias: Tensor,
    thresholds: Sequence[float],
    decay: float,
    *,
    add_after: Tensor | None,
    state: Tensor | None,
    return_state: bool,
    timesteps: int,
    reset: str,
    membranes: str,
) -> tuple[Tensor, Tensor | None]:
    """Scale, bias, multi-level firing and sum in uint8; see `multifire.ops.mlf_uint8`."""
    assert _LIBRARY is not None
    kept = _Kept()
    _, N, C, H, W = sums.shape
    out = sums.new_empty((timesteps, N, H, W, C), dtype=torch.uint8)
    rows = 1 if membranes == "shared" else len(thresholds)
    new_state = sums.new_empty((rows, N, H, W, C)) if return_state else None
    bias_last = bias if bias.dim() == 1 else bias.permute(1, 2, 0)
    _LIBRARY.multifire_fire(
        ctypes.byref(
            FireArgs(
                timesteps=timesteps,
                values=N * H * W * C,
                channels=C,
                bias_period=bias.numel(),
                static_input=sums.shape[0] < timesteps,
                levels=len(thresholds),
                threads=torch.get_num_threads(),
                shared_membrane=membranes == "shared",
                subtract=reset == "subtract",
                decay=decay,
                thresholds=(ctypes.c_double * MAX_LEVELS)(*thresholds),
                sums=kept.pointer(sums, True),
                scale=kept.pointer(scale, False),
                bias=kept.pointer(bias_last, False),
                add_after=kept.pointer(add_after, True),
                state=kept.pointer(state, True),
                out=out.data_ptr(),
                state_out=None if new_state is None else new_state.data_ptr(),
            )
        )
    )
    return out.permute(0, 1, 4, 2, 3), None if new_state is None else new_state.permute(0, 1, 4, 2, 3)
