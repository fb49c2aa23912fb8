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
from typing import NamedTuple

import torch
from torch import Tensor

from multifire.config import neurons
from multifire.ops.autograd import FusedOps
from multifire.ops.call import Backend, Call, Gradients, to_layout

INSTALLED = importlib.util.find_spec("triton") is not None
"""torch's GPU builds for Linux include Triton, others do not. Tested at import, as torch.compile cannot trace it."""
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DTYPES = (torch.float32, torch.bfloat16)
MAX_LEVELS = 8
SCRATCH_BYTES = 256 << 20
"""Maximum memory for the membranes that the backward pass stores, one at the start of each segment."""


class Choice(NamedTuple):
    """How a kernel divides its work. Results are the same with every choice, apart from the rounding of sums."""

    tile: int
    """Elements of a time step that a program computes at a time."""
    warps: int
    registers: int | None = None
    """Maximum number of registers of a thread."""
    programs: int = 2
    """Programs on each multiprocessor, of a kernel that sums over positions: the last one adds up what all summed."""

    def options(self) -> dict[str, int | bool | None]:
        """Return the keyword arguments of a launch. A fused multiply-add would round once, the reference twice."""
        if INTERPRETED:
            return {"TILE": self.tile}
        has_limit = self.registers is not None and torch.version.hip is None  # Triton has no such option for AMD's GPUs
        limit = {"maxnreg": self.registers} if has_limit else {}
        return {"TILE": self.tile, "num_warps": self.warps, "enable_fp_fusion": False, **limit}


CHOICES = {
    "measure": Choice(1024, 8, programs=4),
    "forward": Choice(512, 4),
    "backward": Choice(1024, 8, registers=128),
    "finish": Choice(1024, 4),
    "pack": Choice(1024, 4),
}
"""The choice for each kernel. Compiled for sm_80 to sm_120 with it, no kernel spills registers, and two programs fit a
multiprocessor; see tests/ops/test_triton.py. `python benchmarks/gpu.py --minutes 5 --parts tune` times others."""
TUNED: dict[tuple[int, int], dict[str, Choice]] = {}
"""Choices that were measured to be faster on GPUs of one compute capability, such as (9, 0)."""


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
    layout = _Layout(call)
    x, choice = to_layout(call.x, layout.channels_last), _choice("forward", call.x.device)
    _kernels().forward[layout.tiles(choice)](
        x, call.mean, call.var, call.weight, call.bias, layout.ordered(call.add_before), layout.ordered(call.add_after),
        layout.ordered(call.state), _thresholds(call), out, state,
        call.eps, call.scale, _decay(call), call.timesteps, *layout.sizes, layout.x_stride,
        NORM=call.norm, WEIGHT=call.weight is not None, BIAS=call.bias is not None,
        BEFORE=call.add_before is not None, AFTER=call.add_after is not None,
        STATE=call.state is not None, STATE_OUT=state is not None, **_neuron(call),
        SEGMENT=_segment(call.timesteps), BLOCK_C=layout.block_c, **choice.options(),
    )  # fmt: skip


def _measure(call: Call) -> None:
    """Fill the call's mean and variance with those of x; sums are taken relative to each channel's first value."""
    if call.x.numel() == 0:  # a process without samples in this batch
        return
    layout = _Layout(call)
    x, choice = to_layout(call.x, layout.channels_last), _choice("measure", call.x.device)
    grid = layout.programs(choice)
    _kernels().measure[grid](
        x, layout.parts(grid), layout.counters(grid), call.mean, call.var, len(x) * layout.positions, len(x),
        *layout.sizes, SEGMENT=_segment(len(x)), BLOCK_C=layout.block_c, ROWS=layout.rows, **choice.options(),
    )  # fmt: skip


class _Saved(NamedTuple):
    """What the first pass of the backward pass leaves for the second one."""

    x: Tensor
    layout: "_Layout"
    dy: Tensor
    coefficients: Tensor


def _backward_pass(
    call: Call, grad_out: Tensor, grad_state: Tensor | None, grads: Gradients, grad_sums: Tensor
) -> _Saved:
    layout = _Layout(call)
    x, choice = to_layout(call.x, layout.channels_last), _choice("backward", call.x.device, _halvings(call))
    segment = _segment(call.timesteps)
    segments = call.timesteps // segment
    membranes = 1 if call.membranes == "shared" else len(call.thresholds)
    memory = segments * membranes * choice.tile if segments > 1 else 0
    grid = layout.programs(choice, memory)
    scratch = x.new_empty(grid[0] * grid[1] * memory, dtype=torch.float32)
    learns = grads.learned_thresholds is not None or grads.learned_decay is not None
    sums_of_program = (grid[0] * grid[1], len(call.thresholds) + 1)  # for each θ and the decay
    learned_parts = x.new_empty(sums_of_program, dtype=torch.float64) if learns else None
    # dx overwrites dy in the end. The dy of a static x are summed over time at once.
    dy = grads.add_before if grads.add_before is not None or call.is_static else grads.x
    dy, dy_static = layout.ordered(dy), torch.empty_like(x, dtype=torch.float32) if call.is_static else None
    coefficients = x.new_empty((3, layout.channels), dtype=torch.float32)
    values = call.values if call.norm else 1  # without a norm, x may have any number of dimensions
    _kernels().backward[grid](
        x, call.mean, call.var, call.weight, call.bias, layout.ordered(call.add_before), layout.ordered(call.state),
        _thresholds(call), layout.ordered(grad_out),
        layout.ordered(None if grad_state is None else grad_state.float()), scratch, dy, dy_static, grads.state,
        layout.parts(grid), layout.counters(grid, learns), grad_sums, grads.weight, grads.bias, coefficients,
        learned_parts, grads.learned_thresholds, grads.learned_decay,
        call.eps, call.scale, _decay(call), call.width, values, float(_repeats(call)), call.timesteps,
        *layout.sizes, layout.x_stride,
        NORM=call.norm, WEIGHT=call.weight is not None, BIAS=call.bias is not None,
        BEFORE=call.add_before is not None, STATE=call.state is not None, GRAD_STATE_OUT=grad_state is not None,
        GRAD_STATE=grads.state is not None, GRAD_WEIGHT=grads.weight is not None, GRAD_BIAS=grads.bias is not None,
        DY=dy is not None, STATIC=call.is_static, TRAINING=call.training,
        SURROGATE=neurons.SURROGATES.index(call.surrogate), THROUGH_RESET=not call.detach_reset, **_neuron(call),
        GRAD_THETA=grads.learned_thresholds is not None, GRAD_DECAY=grads.learned_decay is not None,
        SEGMENT=segment, SEGMENTED=memory > 0,
        BLOCK_C=layout.block_c, ROWS=layout.rows, **choice.options(),
    )  # fmt: skip
    summed = dy if dy_static is None else dy_static
    assert summed is not None
    saved = _Saved(x, layout, summed, coefficients)
    if not call.training:
        _finish(call, grads, grad_sums, 1.0, saved)
    return saved


def _finish(call: Call, grads: Gradients, grad_sums: Tensor, values: float, saved: _Saved) -> None:
    x, layout, dy, coefficients = saved
    if not call.norm:
        if dy.data_ptr() != grads.x.data_ptr():
            to_layout(grads.x, layout.channels_last).copy_(dy)
        return
    if call.training and call.sync:
        _kernels().coefficients_of_sums[(1, _ceil(layout.channels, layout.block_c))](
            grad_sums, call.var, call.weight, coefficients, call.eps, call.scale, int(values), float(_repeats(call)),
            layout.channels, WEIGHT=call.weight is not None, BLOCK_C=layout.block_c, **EXACT,
        )  # fmt: skip
    choice = _choice("finish", x.device)
    _kernels().finish[layout.tiles(choice)](
        dy, x, call.mean, coefficients, grads.x, len(x), *layout.sizes,
        TRAINING=call.training, SEGMENT=_segment(len(x)), BLOCK_C=layout.block_c, **choice.options(),
    )  # fmt: skip


def pack(spikes: Tensor, bits: int) -> Tensor:
    """Pack integers below 2^bits, 8/bits in a byte, in memory order. The values are not checked."""
    choice = _pack_choice(spikes)
    blocks = _ceil(spikes.numel() * bits, 8 * choice.tile)
    packed = spikes.new_empty(blocks * choice.tile, dtype=torch.uint8)
    _kernels().pack[(blocks,)](spikes, packed, spikes.numel(), BITS=bits, **choice.options())
    return packed


def unpack(packed: Tensor, bits: int, spikes: Tensor) -> None:
    """Fill `spikes`, a tensor with the shape and memory layout of the packed one."""
    choice = _pack_choice(spikes)
    _kernels().unpack[(len(packed) // choice.tile,)](packed, spikes, spikes.numel(), BITS=bits, **choice.options())


def _pack_choice(spikes: Tensor) -> Choice:
    """Return a choice with which each thread loads or stores 16 bytes of spikes at a time."""
    choice = _choice("pack", spikes.device)
    return choice._replace(warps=choice.warps * spikes.element_size() // 2)


EXACT = {} if INTERPRETED else {"enable_fp_fusion": False}


def _segment(timesteps: int) -> int:
    """Return the number of time steps that are unrolled, which divides T."""
    return next(length for length in _kernels().SEGMENTS if timesteps % length == 0)


def _repeats(call: Call) -> int:
    """Return the number of time steps whose dy are summed on one value of x."""
    return call.timesteps if call.is_static else 1


class _Layout:
    """One time step of a call as positions × channels in memory, and its division among programs."""

    def __init__(self, call: Call):
        x = call.x
        self.device, self.channels_last = x.device, call.channels_last
        self.step = x[0].numel()
        self.channels = x.shape[2] if call.norm else 1
        self.inner = x.shape[3] * x.shape[4] if call.norm and not self.channels_last else 1
        self.positions = self.step // max(1, self.channels)
        self.x_stride = 0 if call.is_static else self.step
        # A tile holds neighbours in memory: channels of channels-last data, positions of contiguous data.
        self.block_c = 1 if self.inner > 1 else min(64, _power_of_2(self.channels))
        self.rows = min(256, 2048 // self.block_c)
        """Number of partial sums of a channel that are loaded at a time."""

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """The numbers that locate a tile, in the order of the kernels' arguments."""
        return self.positions, self.channels, self.inner, self.step

    def ordered(self, x: Tensor | None) -> Tensor | None:
        """Return x as a contiguous tensor in this layout."""
        return None if x is None else to_layout(x, self.channels_last)

    def tiles(self, choice: Choice) -> tuple[int, int]:
        """Return the grid with one program for each tile."""
        return _ceil(self.positions, choice.tile // self.block_c), _ceil(self.channels, self.block_c)

    def programs(self, choice: Choice, numbers: int = 0) -> tuple[int, int]:
        """Return the grid of programs that loop over tiles, limited by `numbers` of scratch memory in each."""
        tiles, blocks = self.tiles(choice)
        most = choice.programs * _processors(self.device)
        if numbers:
            most = min(most, SCRATCH_BYTES // (4 * numbers))
        return max(1, min(tiles, most // blocks)), blocks

    def parts(self, grid: tuple[int, int]) -> Tensor:
        """Return memory for two sums of each program and channel."""
        return torch.empty((2, grid[0], self.channels), dtype=torch.float64, device=self.device)

    def counters(self, grid: tuple[int, int], learns: bool = False) -> Tensor:
        """Return a counter for each block of channels, and with `learns` one for all.

        They count the programs that have stored their sums: 0 so far.
        Every launch has its own counters, set to 0 on its own stream, in a CUDA graph by each replay. No two kernels
        that run at the same time can share one, whatever the streams, threads and graphs, and none outlives its graph's
        memory.
        """
        return torch.zeros(grid[1] + learns, dtype=torch.int32, device=self.device)


def _choice(kernel: str, device: torch.device, halvings: int = 0) -> Choice:
    tuned = TUNED.get(torch.cuda.get_device_capability(device), {}) if device.type == "cuda" and TUNED else {}
    choice = tuned.get(kernel, CHOICES[kernel])
    return choice._replace(tile=choice.tile >> halvings)


def _halvings(call: Call) -> int:
    """Return how often a tile is halved: many levels, learned numbers, and neurons other than MLF need registers."""
    return (len(call.thresholds) > 4) + (call.is_learned or not call.is_mlf)


@functools.cache
def _processors(device: torch.device) -> int:
    """Return the number of multiprocessors; the interpreter computes as if there were a few."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def _neuron(call: Call) -> dict[str, int | bool]:
    """Return what the kernels know of the neuron when they are compiled."""
    return {
        "LEVELS": len(call.thresholds),
        "SHARED": call.membranes == "shared",
        "SUBTRACT": call.reset == "subtract",
        "SIGNED": call.signed,
        "LEARNED_THETA": call.learned_thresholds is not None,
        "LEARNED_DECAY": call.learned_decay is not None,
    }


def _thresholds(call: Call) -> Tensor | tuple[float, ...]:
    """Return θ as the kernels take it: the learned tensor, or numbers, so that nothing is copied to the GPU."""
    if call.learned_thresholds is not None:
        return call.learned_thresholds.contiguous()
    return tuple(map(float, call.thresholds)) or (0.0,)  # the norm alone has no levels, Triton no empty tuple


def _decay(call: Call) -> Tensor | float:
    return call.decay if call.learned_decay is None else call.learned_decay


_ops = FusedOps("tdbn_mlf_triton", Backend(_measure, _forward_pass, _backward_pass, _finish), device_types=None)
mlf, tdbn, tdbn_mlf = _ops.mlf, _ops.tdbn, _ops.tdbn_mlf
