"""The neuron's arithmetic: public functions, each computed by the fastest backend that can.

A backend is a module with the reference's `mlf`, `tdbn` and `tdbn_mlf`, and `why_not(x, levels)`, which returns the
reason why it cannot compute for a tensor x and K = levels, or None if it can.
"""

import os
from collections.abc import Sequence
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from multifire.config import neurons
from multifire.ops import compiled, cpu, reference, triton
from multifire.ops.checks import check_neuron, check_no_norm, check_norm
from multifire.ops.surrogates import register_surrogate
from multifire.utils.errors import unknown
from multifire.utils.log import log

__all__ = [
    "BACKENDS",
    "PAPER_THRESHOLDS",
    "PackedSpikes",
    "backend_name",
    "backends_used",
    "choose_backend",
    "default_thresholds",
    "mlf",
    "mlf_uint8",
    "pack_spikes",
    "register_surrogate",
    "tdbn",
    "tdbn_mlf",
    "unpack_spikes",
]

PAPER_THRESHOLDS = (0.6, 1.6, 2.6)
"""Thresholds θ of the paper, for K = 3 levels."""
BACKENDS: dict[str, ModuleType] = {"cpu": cpu, "triton": triton, "reference": reference}
"""The modules that compute, by the names that `backend=` and MULTIFIRE_BACKEND take."""

_used: dict[str, None] = {}
_announced_surrogates: set[str] = set()


def default_thresholds(levels: int, v_threshold: float = PAPER_THRESHOLDS[0], width: float = 1.0) -> tuple[float, ...]:
    """Return thresholds θ_k = v_threshold + k·width, so that the rectangular surrogate windows tile without a gap."""
    return tuple(v_threshold + k * width for k in range(levels))


def choose_backend(backend: str, x: Tensor, levels: int = 1, surrogate: str = "rect") -> ModuleType:
    """Return the module that computes for a tensor `x` of any shape [...]; see `backend_name`.

    Its first use is announced in the log. For a registered surrogate it is the reference under torch.compile.

    Raises:
        ValueError: no such backend, or it cannot run here; says why.
    """
    name = backend_name(backend, x, levels, surrogate)
    is_registered = surrogate not in neurons.SURROGATES
    _announce(name, backend == "auto" and x.is_cpu and not is_registered)
    if is_registered:
        _announce_registered(surrogate)
        return compiled
    return BACKENDS[name]


def backend_name(backend: str, x: Tensor, levels: int = 1, surrogate: str = "rect") -> str:
    """Return the name of the backend that computes for a tensor `x` of any shape [...].

    "auto" is the environment variable MULTIFIRE_BACKEND if it is set, else the fastest backend that can run.

    Raises:
        ValueError: no such backend, or it cannot run here; says why.
    """
    name = os.environ.get("MULTIFIRE_BACKEND", "auto") if backend == "auto" else backend
    if name == "auto":
        fastest = "cpu" if x.is_cpu else "triton" if x.is_cuda else "reference"
        return fastest if _why_not(fastest, x, levels, surrogate) is None else "reference"
    if name not in BACKENDS:
        raise unknown("backend", name, ["auto", *BACKENDS])
    if (reason := _why_not(name, x, levels, surrogate)) is not None:
        raise ValueError(f"backend {name!r} cannot run here: {reason}")
    return name


def _why_not(backend: str, x: Tensor, levels: int, surrogate: str) -> str | None:
    """Return the reason why a backend cannot compute, or None if it can."""
    if backend != "reference" and surrogate not in neurons.SURROGATES:
        return f"surrogate {surrogate!r} is a registered function, which runs on the reference; take backend='auto'"
    return BACKENDS[backend].why_not(x, levels)


def backends_used() -> list[str]:
    """Return the backends used in this process, in the order of their first use."""
    return list(_used)


@torch.compiler.assume_constant_result  # torch.compile calls it once, while tracing, and keeps it out of the graph
def _announce(name: str, wanted_cpu: bool) -> None:
    if name in _used:  # tested here, inside the function, so that torch.compile does not guard on it
        return
    _used[name] = None
    log.info("neurons run on the %s backend", name)
    if name == "reference" and wanted_cpu and not cpu.is_built():
        log.warning("the CPU kernel is missing, the slow reference computes: %s", cpu.NOT_BUILT)


@torch.compiler.assume_constant_result
def _announce_registered(surrogate: str) -> None:
    if surrogate not in _announced_surrogates:
        _announced_surrogates.add(surrogate)
        log.warning("surrogate %r is a registered function: its neurons take the slow path, the reference", surrogate)


def mlf(
    x: Tensor,
    thresholds: Sequence[float] = PAPER_THRESHOLDS,
    decay: float = 0.25,
    *,
    surrogate: str = "rect",
    width: float = 1.0,
    detach_reset: bool = False,
    state: Tensor | None = None,
    reset: str = "zero",
    membranes: str = "own",
    signed: bool = False,
    learned_thresholds: Tensor | None = None,
    learned_decay: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Multi-level firing neurons over time, and the neurons that followed them.

        u_k[t] = decay · c_k[t-1] + x[t],   s_k[t] = 1 if u_k[t] > θ_k else 0,   o[t] = Σ_k s_k[t]

    Signed levels also fire downwards: s_k = -1 if -u_k > θ_k. A membrane at its threshold does not fire. What it keeps:

        membranes="own",    reset="zero":      c_k = 0 if s_k, else u_k           MLF; signed with K = 1: ternary
        membranes="own",    reset="subtract":  c_k = u_k - θ_k·s_k
        membranes="shared", reset="any":       c = 0 if any s_k, else u           MSF: one u for all levels
        membranes="shared", reset="subtract":  c = u - Σ_k s_k                    I-LIF

    Args:
        x: input currents [T, ...]; half precision is computed in fp32.
        thresholds: θ, one for each of the K levels; ascending if membranes are shared.
        decay: factor of the membrane from one time step to the next.
        surrogate: the derivative ∂s_k/∂u_k used backward: "rect", "triangle", "atan", "sigmoid", "gaussian" or a name
            that `register_surrogate` has registered.
        width: width a of the surrogate; each built-in one has area 1.
        detach_reset: the spikes in c are constants for the gradient.
        state: c [K, ...], or [1, ...] if shared, returned by an earlier call, to continue from; zeros by default.
        reset: "zero", "subtract" or "any".
        membranes: "own": each level has its own; "shared": all levels have one.
        signed: levels fire in both directions.
        learned_thresholds: θ as a tensor [K] that gets a gradient; takes the place of `thresholds`.
        learned_decay: decay as a tensor [] that gets a gradient; takes the place of `decay`.
        backend: "auto" or a name in BACKENDS.

    Returns:
        Spikes o [T, ...], integers 0..K (-K..K if signed) in x's dtype, and the state after the last step.

    Raises:
        ValueError: no time step, no threshold, an unknown surrogate or backend, a state of another shape, a tensor
            as thresholds or decay, or options that do not go together.

    Source: Feng et al., IJCAI 2022, eq. 5-7 and 9; for the others see `multifire.nn.MSF`, `ILIF` and `Ternary`.
    """
    neuron = {
        "surrogate": surrogate, "width": width, "state": state, "reset": reset, "membranes": membranes,
        "signed": signed, "learned_thresholds": learned_thresholds, "learned_decay": learned_decay,
    }  # fmt: skip
    check_neuron(x, thresholds, decay, **neuron)
    body = choose_backend(backend, x, len(thresholds), surrogate)
    return body.mlf(x, tuple(thresholds), decay, detach_reset=detach_reset, **neuron)


def tdbn(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    *,
    training: bool,
    sync: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    scale: float = PAPER_THRESHOLDS[0],
    backend: str = "auto",
) -> Tensor:
    """Threshold-dependent batch norm.

        y = γ · scale·(x - μ) / (sqrt(σ²) + ε) + β,   scale = α·V_th

    Args:
        x: [T, N, C, H, W]; statistics are per channel over T, N, H, W.
        weight: γ [C], or None for 1.
        bias: β [C], or None for 0.
        running_mean: [C]; used in evaluation, updated in place in training.
        running_var: [C], unbiased; likewise.
        training: use the batch's own mean and biased variance.
        sync: in training, use statistics over the batches of all processes; all of them must call.
        momentum: weight of the new batch in the running statistics.
        eps: ε, added outside the root.
        scale: α·V_th.
        backend: "auto" or a name in BACKENDS.

    Returns:
        y, shaped as x, in fp32 or better.

    Raises:
        ValueError: x is not five-dimensional, its channels do not fit, or training on one value per channel.

    Source: Zheng et al., "Going Deeper With Directly-Trained Larger Spiking Neural Networks", AAAI 2021.
    """
    check_norm(x, weight, bias, running_mean, running_var, training, sync)
    return choose_backend(backend, x).tdbn(
        x, weight, bias, running_mean, running_var,
        training=training, sync=sync, momentum=momentum, eps=eps, scale=scale,
    )  # fmt: skip


def tdbn_mlf(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    *,
    training: bool,
    sync: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    scale: float = PAPER_THRESHOLDS[0],
    thresholds: Sequence[float] = PAPER_THRESHOLDS,
    decay: float = 0.25,
    surrogate: str = "rect",
    width: float = 1.0,
    detach_reset: bool = False,
    add_before: Tensor | None = None,
    add_after: Tensor | None = None,
    state: Tensor | None = None,
    return_state: bool = False,
    timesteps: int | None = None,
    reset: str = "zero",
    membranes: str = "own",
    signed: bool = False,
    learned_thresholds: Tensor | None = None,
    learned_decay: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """Compute tdBN, an optional sum, multi-level firing, and another optional sum, in one pass over the data.

        o = mlf(tdbn(x) + add_before) + add_after

    Args:
        x: a convolution's output [T, N, C, H, W]. The other arguments are those of `tdbn` and `mlf`.
        running_mean: None, like the norm's three other tensors, if the norm is folded into the convolution.
        add_before: shortcut of a plain block, shaped as x.
        add_after: shortcut of a dormant-suppressed block, shaped as x.
        return_state: return the membranes after the last step, to continue from.
        timesteps: T, if x [1, N, C, H, W] stands for T equal steps, as for a still image; default: x's own.

    Returns:
        o [T, N, C, H, W] in x's dtype, and the state [K, N, C, H, W], or None without return_state.

    Raises:
        ValueError: as `tdbn` and `mlf`, or a shortcut of another shape.
    """
    if running_mean is None or running_var is None:
        check_no_norm(x, weight, bias, running_mean, running_var, training)
    else:
        check_norm(x, weight, bias, running_mean, running_var, training, sync)
    neuron = {
        "surrogate": surrogate, "width": width, "state": state, "reset": reset, "membranes": membranes,
        "signed": signed, "learned_thresholds": learned_thresholds, "learned_decay": learned_decay,
    }  # fmt: skip
    check_neuron(x, thresholds, decay, **neuron)
    timesteps = x.shape[0] if timesteps is None else timesteps
    if timesteps < 1 or x.shape[0] not in (1, timesteps):
        raise ValueError(f"x has shape {tuple(x.shape)}, expected 1 or timesteps = {timesteps} >= 1 in front")
    expected = (timesteps, *x.shape[1:])
    for name, add in (("add_before", add_before), ("add_after", add_after)):
        if add is not None and add.shape != expected:
            raise ValueError(f"{name} has shape {tuple(add.shape)}, expected x's {expected}")
    return choose_backend(backend, x, len(thresholds), surrogate).tdbn_mlf(
        x,
        weight,
        bias,
        running_mean,
        running_var,
        training=training,
        sync=sync,
        momentum=momentum,
        eps=eps,
        scale=scale,
        thresholds=tuple(thresholds),
        decay=decay,
        detach_reset=detach_reset,
        add_before=add_before,
        add_after=add_after,
        return_state=return_state,
        timesteps=timesteps,
        **neuron,
    )


def mlf_uint8(
    sums: Tensor,
    scale: Tensor,
    bias: Tensor,
    thresholds: Sequence[float] = PAPER_THRESHOLDS,
    decay: float = 0.25,
    *,
    add_after: Tensor | None = None,
    state: Tensor | None = None,
    return_state: bool = False,
    timesteps: int | None = None,
    reset: str = "zero",
    membranes: str = "own",
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """Multi-level firing on a convolution's integer sums, for int8 inference; spikes are uint8.

        o = mlf(scale·sums + bias) + add_after

    Args:
        sums: integers of a convolution, [T, N, C, H, W] in float32; T and `timesteps` as in `tdbn_mlf`.
        scale: [C], the value of a sum of 1.
        bias: [C], or [C, H, W] if it differs along the borders.
        add_after: uint8 [T, N, C, H, W]; the caller ensures that the sum stays within 255.
        return_state: return the membranes after the last step, to continue from.
        reset: as in `mlf`, also `membranes`.

    Returns:
        o [T, N, C, H, W] in uint8, and the state [K or 1, N, C, H, W], or None without return_state.

    Raises:
        ValueError: a shape or type that does not fit, or no threshold.
    """
    timesteps = sums.shape[0] if timesteps is None else timesteps
    check_neuron(sums, thresholds, decay, "rect", 1.0, state, reset, membranes)
    if sums.dim() != 5 or sums.dtype != torch.float32 or sums.shape[0] not in (1, timesteps):
        found = f"sums has shape {tuple(sums.shape)}, {sums.dtype}"
        raise ValueError(f"{found}, expected [T, N, C, H, W] in float32 with T = 1 or timesteps = {timesteps}")
    C, H, W = sums.shape[2:]
    if scale.shape != (C,) or bias.shape not in ((C,), (C, H, W)):
        shapes = f"scale has shape {tuple(scale.shape)} and bias {tuple(bias.shape)}"
        raise ValueError(f"{shapes}, expected ({C},), and for bias that or {(C, H, W)}")
    for name, tensor in (("scale", scale), ("bias", bias), ("state", state)):
        if tensor is not None and tensor.dtype != torch.float32:
            raise ValueError(f"{name} is of {tensor.dtype}, expected torch.float32, which int8 networks keep")
    if add_after is not None and (add_after.shape != (timesteps, *sums.shape[1:]) or add_after.dtype != torch.uint8):
        found = f"add_after has shape {tuple(add_after.shape)}, {add_after.dtype}"
        raise ValueError(f"{found}, expected {(timesteps, *sums.shape[1:])} in uint8")
    body = cpu if choose_backend(backend, sums, len(thresholds)) is cpu else reference
    return body.mlf_uint8(
        sums, scale, bias, tuple(thresholds), decay,
        add_after=add_after, state=state, return_state=return_state, timesteps=timesteps, reset=reset,
        membranes=membranes,
    )  # fmt: skip


class PackedSpikes(NamedTuple):
    """Small integers, several in a byte; see `unpack_spikes`."""

    bytes: Tensor
    bits: int
    """Bits of a value: 2, 4 or 8."""
    shape: torch.Size
    order: torch.memory_format
    backend: str
    """Name of the backend that packed them: each has its own order of values in a byte."""


def pack_spikes(x: Tensor, bits: int = 2, max_value: int | None = None) -> PackedSpikes | None:
    """Pack integers 0..255 of any shape [...] into 2, 4 or 8 bits each; return None if x is to be kept unpacked.

    On a CPU every value is checked: the number of bits, at least `bits`, is the smallest that fits, and the result is
    None if x holds another value. On a GPU a check would make the host wait in every layer: `max_value`, the largest
    integer that x may hold, gives the number of bits. Without it, or above 255, the result is None.
    """
    backend = _packing_backend(x)
    if BACKENDS[backend].why_not(x, 1) is not None:
        return None
    last = x.dim() == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
    order = torch.channels_last if last else torch.contiguous_format
    x = x.contiguous(memory_format=order)
    if backend == "cpu":
        for tried in cpu.BITS:
            if tried >= bits and (packed := cpu.pack(x, tried)) is not None:
                return PackedSpikes(packed, tried, x.shape, order, backend)
    elif max_value is not None and max_value < 256:
        fitting = next(tried for tried in cpu.BITS if max_value < 2**tried)
        return PackedSpikes(triton.pack(x, fitting), fitting, x.shape, order, backend)
    return None


def unpack_spikes(packed: PackedSpikes, dtype: torch.dtype) -> Tensor:
    """Return the spikes that `pack_spikes` packed, as a tensor of type `dtype`.

    Raises:
        ValueError: on a CPU, a type other than float32 and bfloat16.
    """
    if packed.backend == "cpu" and dtype not in cpu.DTYPES:
        raise ValueError(f"dtype is {dtype}, expected one of {', '.join(map(str, cpu.DTYPES))}")
    x = torch.empty(packed.shape, dtype=dtype, memory_format=packed.order, device=packed.bytes.device)
    (cpu if packed.backend == "cpu" else triton).unpack(packed.bytes, packed.bits, x)
    return x


def _packing_backend(x: Tensor) -> str:
    """Return "triton" for a GPU, or where its interpreter is chosen by MULTIFIRE_BACKEND; else "cpu"."""
    interpreted = triton.INTERPRETED and os.environ.get("MULTIFIRE_BACKEND") == "triton"
    return "triton" if x.is_cuda or interpreted else "cpu"
