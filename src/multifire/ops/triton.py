"""The fused GPU kernel in Triton, host side; the kernels are in triton_kernels.py, their definition in reference.py.

Channels-last and contiguous tensors differ only in strides. TRITON_INTERPRET=1 runs the kernels on a CPU step by step,
which tests them without a GPU.

Shapes: T time steps, K levels, N samples, C channels, H rows, W columns.
Source: Feng et al., "Multi-Level Firing with Spiking DS-ResNet", IJCAI 2022.
"""

import functools
import importlib
import importlib.util
import os
from types import ModuleType

import torch
from torch import Tensor

from multifire.ops import reference
from multifire.ops.autograd import FusedOps
from multifire.ops.call import Backend, Call, Gradients, to_layout

INSTALLED = importlib.util.find_spec("triton") is not None
"""torch's GPU builds for Linux include Triton, others do not. Tested at import, as torch.compile cannot trace it."""
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DTYPES = (torch.float32, torch.bfloat16)
MAX_LEVELS = 8
PROGRAMS = 512
"""Programs of a pass that sums over positions: enough to fill a GPU, and few partial sums."""
SCRATCH_BYTES = 256 << 20
"""Maximum memory for the membranes that the backward pass stores, one for every SEGMENT time steps."""


def why_not(x: Tensor, levels: int) -> str | None:
    """Return the reason why Triton cannot compute for `x` and K = levels, or None if it can."""
    if not INSTALLED:
        return "triton is not installed"
    if x.device.type != "cuda" and not INTERPRETED:
        return f"x lies on {x.device.type}, and Triton compiles for GPUs; TRITON_INTERPRET=1 runs it anywhere, slowly"
    if x.dtype not in DTYPES:
        return f"x is of {x.dtype}, expected float32 or bfloat16"
    if levels > MAX_LEVELS:
        return f"{levels} levels, expected at most {MAX_LEVELS}"
    return None


@functools.cache
def _kernels() -> ModuleType:
    """Import the kernels when they are first needed, so that a run on a CPU does not wait for them."""
    return importlib.import_module("multifire.ops.triton_kernels")


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


def _power_of_2(n: int) -> int:
    """Return the smallest power of two >= n."""
    return 1 << max(0, n - 1).bit_length()


def _forward_pass(call: Call, out: Tensor, state: Tensor | None, _left: None) -> None:
    grid = _Grid(call)
    x = to_layout(call.x, grid.order)
    _kernels().forward[grid.tiles](
        x, call.mean, call.var, call.weight, call.bias, grid.to_layout(call.add_before), grid.to_layout(call.add_after),
        grid.to_layout(call.state), _thresholds(tuple(call.thresholds), grid.slots, x.device), out, state,
        call.eps, call.scale, call.decay, call.timesteps,
        grid.positions, grid.channels, grid.inner, grid.step, grid.x_stride,
        NORM=call.norm, WEIGHT=call.weight is not None, BIAS=call.bias is not None,
        BEFORE=call.add_before is not None, AFTER=call.add_after is not None,
        STATE=call.state is not None, STATE_OUT=state is not None,
        LEVELS=len(call.thresholds), SLOTS=grid.slots, BLOCK_C=grid.block_c, **EXACT,
    )  # fmt: skip


def _measure(call: Call) -> None:
    """Fill the call's mean and variance with those of x; sums are taken relative to each channel's first value."""
    if call.x.shape[1] == 0:  # a process without samples in this batch
        return
    grid = _Grid(call)
    x = to_layout(call.x, grid.order)
    programs = grid.programs()
    sums, squares = x.new_empty((2, programs[1], grid.channels), dtype=torch.float64)
    _kernels().stats[programs](
        x, sums, squares, len(x), grid.positions, grid.channels, grid.inner, grid.step,
        LEVELS=0, BLOCK_C=grid.block_c, **EXACT,
    )  # fmt: skip
    _kernels().pool_statistics[grid.pools](
        x, sums, squares, call.mean, call.var, programs[1], len(x) * grid.positions, grid.channels, grid.inner, **POOL
    )


def _backward_pass(
    call: Call, grad_out: Tensor, grad_state: Tensor | None, grads: Gradients, grad_sums: Tensor
) -> tuple[Tensor, "_Grid", Tensor]:
    grid = _Grid(call)
    x = to_layout(call.x, grid.order)
    segments = _ceil(call.timesteps, _kernels().SEGMENT)
    segmented = segments > 1 and len(call.thresholds) > 0
    slot_size = grid.slots * _kernels().MAX_TILE
    memory = segments * slot_size if segmented else 0
    programs = grid.programs(memory)
    scratch = x.new_empty(programs[0] * programs[1] * memory, dtype=torch.float32)
    parts = x.new_empty((2, programs[1], grid.channels), dtype=torch.float64)
    dy = grads.add_before
    if dy is None:  # dx overwrites dy in the end, except for a static x, whose time steps are summed first
        dy = torch.empty_like(grad_out, dtype=torch.float32) if call.is_static else grads.x
    dy_ordered = to_layout(dy, grid.order)
    _kernels().backward[programs](
        x, call.mean, call.var, call.weight, call.bias, grid.to_layout(call.add_before), grid.to_layout(call.state),
        _thresholds(tuple(call.thresholds), grid.slots, x.device), grid.to_layout(grad_out),
        grid.to_layout(None if grad_state is None else grad_state.float()), scratch, dy_ordered, grads.state,
        parts[0], parts[1], call.eps, call.scale, call.decay, call.width,
        call.timesteps, grid.positions, grid.channels, grid.inner, grid.step, grid.x_stride,
        NORM=call.norm, WEIGHT=call.weight is not None, BIAS=call.bias is not None,
        BEFORE=call.add_before is not None, STATE=call.state is not None, GRAD_STATE_OUT=grad_state is not None,
        GRAD_STATE=grads.state is not None, SEGMENT=_kernels().SEGMENT, SEGMENTED=segmented,
        SURROGATE=list(reference.SURROGATES).index(call.surrogate), THROUGH_RESET=not call.detach_reset,
        LEVELS=len(call.thresholds), SLOTS=grid.slots, SLOT_SIZE=slot_size, BLOCK_C=grid.block_c, **EXACT,
    )  # fmt: skip
    if call.norm:
        _kernels().pool_sums[grid.pools](
            parts[0], parts[1], call.var, grad_sums, grads.weight, grads.bias, call.eps, call.scale,
            programs[1], grid.channels,
            GRAD_WEIGHT=grads.weight is not None, GRAD_BIAS=grads.bias is not None, **POOL,
        )  # fmt: skip
    saved = (x, grid, dy_ordered)
    if not call.training:
        _finish(call, grads, grad_sums, 1.0, saved)
    return saved


def _finish(
    call: Call, grads: Gradients, grad_sums: Tensor, values: float, saved: tuple[Tensor, "_Grid", Tensor]
) -> None:
    x, grid, dy = saved
    if call.is_static:
        dy = dy.float().sum(0, keepdim=True)
    if not call.norm:
        if dy.data_ptr() != grads.x.data_ptr():
            to_layout(grads.x, grid.order).copy_(dy)
        return
    _kernels().finish[grid.tiles](
        dy, x, call.mean, call.var, call.weight, grad_sums, grads.x, call.eps, call.scale,
        int(values), call.timesteps if call.is_static else 1,
        len(x), grid.positions, grid.channels, grid.inner, grid.step,
        TRAINING=call.training, WEIGHT=call.weight is not None,
        LEVELS=0, BLOCK_C=grid.block_c, **EXACT,
    )  # fmt: skip


# A fused multiply-add rounds once, the reference twice; a spike could differ.
EXACT = {} if INTERPRETED else {"enable_fp_fusion": False}
POOL = {"BLOCK_C": 16, "ROWS": 64, **EXACT}
"""Channels of a program that adds up partial sums, and how many partial sums it loads at a time."""


class _Grid:
    """One time step of a call as positions × channels, and its division among programs."""

    def __init__(self, call: Call):
        x = call.x
        self.order = call.channels_last
        self.step = x[0].numel()
        self.channels = x.shape[2] if call.norm else 1
        self.inner = x.shape[3] * x.shape[4] if call.norm and not self.order else 1
        self.positions = self.step // max(1, self.channels)
        self.x_stride = 0 if call.is_static else self.step
        self.slots = _power_of_2(max(1, len(call.thresholds)))
        # A tile holds neighbours in memory: channels of channels-last data, positions of contiguous data.
        self.block_c = 1 if self.inner > 1 else min(64, _power_of_2(self.channels))

    def to_layout(self, x: Tensor | None) -> Tensor | None:
        return None if x is None else to_layout(x, self.order)

    def tiles(self, meta: dict) -> tuple[int, int]:
        """Return the grid with one program for each tile."""
        block_p = meta["TILE"] // self.block_c
        return _ceil(self.positions, block_p), _ceil(self.channels, self.block_c)

    @property
    def pools(self) -> tuple[int]:
        """Return the grid with one program for each POOL["BLOCK_C"] channels."""
        return (_ceil(self.channels, POOL["BLOCK_C"]),)

    def programs(self, numbers: int = 0) -> tuple[int, int]:
        """Return the grid of programs that loop over tiles, limited by `numbers` of scratch memory in each."""
        blocks = _ceil(self.channels, self.block_c)
        most = min(PROGRAMS, SCRATCH_BYTES // (4 * numbers) if numbers else PROGRAMS)
        useful = _ceil(self.positions, _kernels().SHAPES[0][0] // self.block_c)
        return blocks, max(1, min(most // blocks, useful))


@functools.lru_cache
def _thresholds(thresholds: tuple[float, ...], slots: int, device: torch.device) -> Tensor:
    """Return θ on the device, padded by levels that never fire; cached, since a copy to the device would wait."""
    return torch.tensor([*thresholds, *[float("inf")] * (slots - len(thresholds))], dtype=torch.float32, device=device)


_ops = FusedOps("tdbn_mlf_triton", Backend(_measure, _forward_pass, _backward_pass, _finish), device_types=None)
mlf, tdbn, tdbn_mlf = _ops.mlf, _ops.tdbn, _ops.tdbn_mlf
