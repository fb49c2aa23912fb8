"""The fused GPU kernel in Triton; the definition of what it computes is reference.py.

A tile is P positions (of a sample's plane) × C channels; programs take it through all time steps with the membranes of every
level in registers. Channels-last and contiguous tensors differ in strides alone. On a CPU, TRITON_INTERPRET=1 runs the same
code step by step, which is how it is tested without a GPU.

Shapes: T time steps, K levels, N samples, C channels, H rows, W columns.
Source: Feng et al., "Multi-Level Firing with Spiking DS-ResNet", IJCAI 2022.
"""

import functools
import os

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # wheels of torch for other systems come without it
    triton = None

from multifire.ops import reference
from multifire.ops.fused import Call, FusedOps, Gradients, in_order

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DTYPES = (torch.float32, torch.bfloat16)
MAX_LEVELS = 8
PROGRAMS = 512
"""Programs of a pass that sums over positions: enough to fill a GPU, few enough that their partial sums are small."""
SCRATCH_BYTES = 256 << 20
"""Most memory for the membranes that the backward pass recomputes."""


def why_not(x: Tensor, levels: int) -> str | None:
    """Why Triton cannot compute for `x` with so many levels, or None where it can."""
    if triton is None:
        return "triton is not installed"
    if x.device.type != "cuda" and not INTERPRETED:
        return f"x lies on {x.device.type}, and Triton compiles for GPUs; TRITON_INTERPRET=1 runs it anywhere, slowly"
    if x.dtype not in DTYPES:
        return f"x is of {x.dtype}, expected float32 or bfloat16"
    if levels > MAX_LEVELS:
        return f"{levels} levels, expected at most {MAX_LEVELS}"
    return None


if triton is not None:
    # Elements of a tile, and warps that share them. The interpreter, for which speed means nothing, takes the first.
    SHAPES = [(256, 4), (512, 4), (1024, 4), (1024, 8)]
    MOST_TILE = max(tile for tile, _ in SHAPES)
    tuned = functools.partial(
        triton.autotune,
        [triton.Config({"TILE": tile}, num_warps=warps) for tile, warps in (SHAPES[:1] if INTERPRETED else SHAPES)],
        key=["channels", "inner", "timesteps", "LEVELS"],
    )

    @triton.jit
    def _surrogate(v, width, KIND: tl.constexpr):
        """Surrogate derivative at v; the numbering is the order of reference.SURROGATES."""
        if KIND == 0:
            h = tl.where(tl.abs(v) < width / 2, 1.0 / width, 0.0)
        elif KIND == 1:
            h = tl.maximum(1 - tl.abs(v) / width, 0.0) / width
        else:
            z = 3.141592653589793 / width * v
            h = 1 / (width * (1 + z * z))
        return h

    @triton.jit
    def _offsets(p, c, channels, inner):
        """Places of positions p × channels c within one time step: [outer, channels, inner], the last fastest."""
        return (p // inner * (channels * inner) + p % inner)[:, None] + (c * inner)[None, :]

    @triton.jit
    def _channel(pointer, c, channels, otherwise, HAS: tl.constexpr):
        """One number per channel, as a row."""
        if HAS:
            return tl.load(pointer + c, c < channels, other=otherwise)[None, :]
        else:
            return (tl.zeros_like(c).to(tl.float32) + otherwise)[None, :]

    @tuned()
    @triton.jit
    def _stats(x, shift, sums, squares, timesteps, positions, channels, inner, step,
               LEVELS: tl.constexpr, BLOCK_C: tl.constexpr, TILE: tl.constexpr):  # fmt: skip
        """Each program's Σ(x - shift) and Σ(x - shift)² per channel, in double."""
        BLOCK_P: tl.constexpr = TILE // BLOCK_C
        step = tl.cast(step, tl.int64)  # T of them may be more than 32 bits count
        c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
        about = tl.load(shift + c, c < channels, other=0.0)[None, :]
        total = tl.zeros([BLOCK_C], tl.float64)
        square = tl.zeros([BLOCK_C], tl.float64)
        for block in range(tl.program_id(1), tl.cdiv(positions, BLOCK_P), tl.num_programs(1)):
            p = block * BLOCK_P + tl.arange(0, BLOCK_P)
            mask = (p < positions)[:, None] & (c < channels)[None, :]
            at = _offsets(p.to(tl.int64), c, channels, inner)
            for t in range(timesteps):
                value = tl.load(x + t * step + at, mask, other=0.0).to(tl.float32)
                d = tl.where(mask, value - about, 0.0).to(tl.float64)
                total += tl.sum(d, 0)
                square += tl.sum(d * d, 0)
        here = tl.program_id(1) * channels + c
        tl.store(sums + here, total, c < channels)
        tl.store(squares + here, square, c < channels)

    @tuned()
    @triton.jit
    def _forward(x, mean, factor, weight, bias, before, after, state, thresholds, out, state_out,
                 decay, timesteps, positions, channels, inner, step, x_stride,
                 NORM: tl.constexpr, WEIGHT: tl.constexpr, BIAS: tl.constexpr, BEFORE: tl.constexpr, AFTER: tl.constexpr,
                 STATE: tl.constexpr, STATE_OUT: tl.constexpr, LEVELS: tl.constexpr, SLOTS: tl.constexpr,
                 BLOCK_C: tl.constexpr, TILE: tl.constexpr):  # fmt: skip
        """Norm, sum, firing, sum."""
        BLOCK_P: tl.constexpr = TILE // BLOCK_C
        step = tl.cast(step, tl.int64)  # T of them may be more than 32 bits count
        x_stride = tl.cast(x_stride, tl.int64)
        p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
        c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
        k = tl.arange(0, SLOTS)
        mask = (p < positions)[:, None] & (c < channels)[None, :]
        at = _offsets(p.to(tl.int64), c, channels, inner)
        of_level = k.to(tl.int64)[:, None, None] * step + at[None, :, :]
        level_mask = (k < LEVELS)[:, None, None] & mask[None, :, :]
        theta = tl.load(thresholds + k)[:, None, None]
        mu = _channel(mean, c, channels, 0.0, NORM)
        gain = _channel(factor, c, channels, 1.0, NORM)
        gamma = _channel(weight, c, channels, 1.0, WEIGHT)
        beta = _channel(bias, c, channels, 0.0, BIAS)
        if STATE:
            carry = tl.load(state + of_level, level_mask, other=0.0)
        else:
            carry = tl.zeros([SLOTS, BLOCK_P, BLOCK_C], tl.float32)
        for t in range(timesteps):
            y = tl.load(x + t * x_stride + at, mask, other=0.0).to(tl.float32)
            y = (y - mu) * gain * gamma + beta
            if BEFORE:
                y += tl.load(before + t * step + at, mask, other=0.0).to(tl.float32)
            if LEVELS == 0:
                o = y
            else:
                u = decay * carry + y[None, :, :]
                fires = u > theta
                carry = tl.where(fires, 0.0, u)
                o = tl.sum(tl.where(fires, 1.0, 0.0), 0)
            if AFTER:
                o += tl.load(after + t * step + at, mask, other=0.0).to(tl.float32)
            tl.store(out + t * step + at, o.to(out.dtype.element_ty), mask)
        if STATE_OUT:
            tl.store(state_out + of_level, carry, level_mask)

    @tuned()
    @triton.jit
    def _backward(x, mean, factor, weight, bias, before, state, thresholds, grad_out, grad_state_out, scratch,
                  dy_out, grad_state, sums, products, decay, width,
                  timesteps, positions, channels, inner, step, x_stride,
                  NORM: tl.constexpr, WEIGHT: tl.constexpr, BIAS: tl.constexpr, BEFORE: tl.constexpr, STATE: tl.constexpr,
                  GRAD_STATE_OUT: tl.constexpr, GRAD_STATE: tl.constexpr, SURROGATE: tl.constexpr,
                  THROUGH_RESET: tl.constexpr, LEVELS: tl.constexpr, SLOTS: tl.constexpr, SLOT_SIZE: tl.constexpr,
                  BLOCK_C: tl.constexpr, TILE: tl.constexpr):  # fmt: skip
        """First pass: recompute the membranes, then run time backwards; dy, and each program's Σdy and Σdy·(x - μ).

        δ_k[t] = g[t]·h_k[t] + δ_k[t+1]·decay·((1 - s_k[t]) - u_k[t]·h_k[t]),   dy[t] = Σ_k δ_k[t]
        """
        BLOCK_P: tl.constexpr = TILE // BLOCK_C
        step = tl.cast(step, tl.int64)  # T of them may be more than 32 bits count
        x_stride = tl.cast(x_stride, tl.int64)
        c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
        k = tl.arange(0, SLOTS)
        theta = tl.load(thresholds + k)[:, None, None]
        mu = _channel(mean, c, channels, 0.0, NORM)
        gain = _channel(factor, c, channels, 1.0, NORM)
        gamma = _channel(weight, c, channels, 1.0, WEIGHT)
        beta = _channel(bias, c, channels, 0.0, BIAS)
        total = tl.zeros([BLOCK_C], tl.float64)
        product = tl.zeros([BLOCK_C], tl.float64)
        program = (tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)).to(tl.int64)
        place = k[:, None, None] * (BLOCK_P * BLOCK_C) + tl.arange(0, BLOCK_P)[None, :, None] * BLOCK_C
        memory = scratch + program * timesteps * SLOT_SIZE + place + tl.arange(0, BLOCK_C)[None, None, :]
        for block in range(tl.program_id(1), tl.cdiv(positions, BLOCK_P), tl.num_programs(1)):
            p = block * BLOCK_P + tl.arange(0, BLOCK_P)
            mask = (p < positions)[:, None] & (c < channels)[None, :]
            at = _offsets(p.to(tl.int64), c, channels, inner)
            of_level = k.to(tl.int64)[:, None, None] * step + at[None, :, :]
            level_mask = (k < LEVELS)[:, None, None] & mask[None, :, :]
            carry = tl.zeros([SLOTS, BLOCK_P, BLOCK_C], tl.float32)
            if LEVELS > 0:
                if STATE:
                    carry = tl.load(state + of_level, level_mask, other=0.0)
                for t in range(timesteps):
                    y = tl.load(x + t * x_stride + at, mask, other=0.0).to(tl.float32)
                    y = (y - mu) * gain * gamma + beta
                    if BEFORE:
                        y += tl.load(before + t * step + at, mask, other=0.0).to(tl.float32)
                    u = decay * carry + y[None, :, :]
                    tl.store(memory + t * SLOT_SIZE, u)
                    carry = tl.where(u > theta, 0.0, u)

            delta = tl.zeros([SLOTS, BLOCK_P, BLOCK_C], tl.float32)  # ∂L/∂carry
            if GRAD_STATE_OUT:
                delta = tl.load(grad_state_out + of_level, level_mask, other=0.0)
            for back in range(timesteps):
                t = timesteps - 1 - back
                grad = tl.load(grad_out + t * step + at, mask, other=0.0).to(tl.float32)
                if LEVELS == 0:
                    dy = grad
                else:
                    u = tl.load(memory + t * SLOT_SIZE)
                    h = _surrogate(u - theta, width, SURROGATE)
                    gate = tl.where(u > theta, 0.0, 1.0)
                    if THROUGH_RESET:
                        gate -= u * h
                    d = tl.where(level_mask, grad[None, :, :] * h + delta * gate, 0.0)
                    delta = decay * d
                    dy = tl.sum(d, 0)
                value = tl.load(x + t * x_stride + at, mask, other=0.0).to(tl.float32)
                total += tl.sum(dy.to(tl.float64), 0)
                product += tl.sum(tl.where(mask, dy * (value - mu), 0.0).to(tl.float64), 0)
                tl.store(dy_out + t * step + at, dy.to(dy_out.dtype.element_ty), mask)
            if GRAD_STATE:
                tl.store(grad_state + of_level, delta, level_mask)
        here = tl.program_id(1) * channels + c
        tl.store(sums + here, total, c < channels)
        tl.store(products + here, product, c < channels)

    @tuned(restore_value=["dy"])  # dx may stand where dy did, and tuning runs the kernel more than once
    @triton.jit
    def _finish(dy, x, mean, slope, offset, tilt, dx, timesteps, positions, channels, inner, step,
                LEVELS: tl.constexpr, BLOCK_C: tl.constexpr, TILE: tl.constexpr):  # fmt: skip
        """Second pass: dx = slope·dy + (offset + tilt·(x - μ))."""
        BLOCK_P: tl.constexpr = TILE // BLOCK_C
        step = tl.cast(step, tl.int64)  # T of them may be more than 32 bits count
        p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
        c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
        mask = (p < positions)[:, None] & (c < channels)[None, :]
        at = _offsets(p.to(tl.int64), c, channels, inner)
        mu = _channel(mean, c, channels, 0.0, True)
        slopes = _channel(slope, c, channels, 0.0, True)
        offsets = _channel(offset, c, channels, 0.0, True)
        tilts = _channel(tilt, c, channels, 0.0, True)
        for t in range(timesteps):
            out = tl.load(dy + t * step + at, mask, other=0.0).to(tl.float32)
            value = tl.load(x + t * step + at, mask, other=0.0).to(tl.float32)
            out = slopes * out + (offsets + tilts * (value - mu))
            tl.store(dx + t * step + at, out.to(dx.dtype.element_ty), mask)


def _forward_pass(call: Call, out: Tensor, state: Tensor | None) -> None:
    grid = _Grid(call)
    if call.training:
        _measure(call, grid)
    x = in_order(call.x, grid.order)
    factor = call.factor() if call.norm else None
    _forward[grid.tiles](
        x, call.mean, factor, call.weight, call.bias, grid.place(call.add_before), grid.place(call.add_after),
        grid.place(call.state), _thresholds(tuple(call.thresholds), grid.slots, x.device), out, state,
        call.decay, call.timesteps, grid.positions, grid.channels, grid.inner, grid.step, grid.x_stride,
        NORM=call.norm, WEIGHT=call.weight is not None, BIAS=call.bias is not None,
        BEFORE=call.add_before is not None, AFTER=call.add_after is not None,
        STATE=call.state is not None, STATE_OUT=state is not None,
        LEVELS=len(call.thresholds), SLOTS=grid.slots, BLOCK_C=grid.block_c, **EXACT,
    )  # fmt: skip


def _measure(call: Call, grid: "_Grid") -> None:
    """Fill the call's mean and variance with those of x, summed about each channel's first value."""
    x = in_order(call.x, grid.order)
    shift = call.x[0, 0, :, 0, 0].float().contiguous()
    programs = grid.programs(len(x), slots=0)
    sums, squares = x.new_empty((2, programs[1], grid.channels), dtype=torch.float64)
    _stats[programs](
        x, shift, sums, squares, len(x), grid.positions, grid.channels, grid.inner, grid.step,
        LEVELS=0, BLOCK_C=grid.block_c, **EXACT,
    )  # fmt: skip
    n = len(x) * grid.positions
    total, square = sums.sum(0), squares.sum(0)
    call.mean.copy_(shift + total / n)
    call.var.copy_(((square - total * total / n) / n).clamp_min(0))


def _backward_pass(call: Call, grad_out: Tensor, grad_state: Tensor | None, grads: Gradients) -> None:
    grid = _Grid(call)
    x = in_order(call.x, grid.order)
    factor = call.factor() if call.norm else None
    programs = grid.programs(call.timesteps, grid.slots)
    slot_size = grid.slots * MOST_TILE
    scratch = x.new_empty(programs[0] * programs[1] * call.timesteps * slot_size, dtype=torch.float32)
    sums, products = x.new_empty((2, programs[1], grid.channels), dtype=torch.float64)
    dy = grads.add_before
    if dy is None:  # dx takes its place in the end, but for a still x, whose time steps are added up first
        dy = torch.empty_like(grad_out, dtype=torch.float32) if call.shared else grads.x
    dy_ordered = in_order(dy, grid.order)
    _backward[programs](
        x, call.mean, factor, call.weight, call.bias, grid.place(call.add_before), grid.place(call.state),
        _thresholds(tuple(call.thresholds), grid.slots, x.device), grid.place(grad_out),
        grid.place(None if grad_state is None else grad_state.float()), scratch, dy_ordered, grads.state, sums, products,
        call.decay, call.width, call.timesteps, grid.positions, grid.channels, grid.inner, grid.step, grid.x_stride,
        NORM=call.norm, WEIGHT=call.weight is not None, BIAS=call.bias is not None, BEFORE=call.add_before is not None,
        STATE=call.state is not None, GRAD_STATE_OUT=grad_state is not None, GRAD_STATE=grads.state is not None,
        SURROGATE=list(reference.SURROGATES).index(call.surrogate), THROUGH_RESET=not call.detach_reset,
        LEVELS=len(call.thresholds), SLOTS=grid.slots, SLOT_SIZE=slot_size, BLOCK_C=grid.block_c, **EXACT,
    )  # fmt: skip
    total, product = sums.sum(0), products.sum(0)
    if grads.weight is not None:
        grads.weight.copy_(product * factor)
    if grads.bias is not None:
        grads.bias.copy_(total)
    _input_gradient(call, grid, x, factor, dy_ordered, total, product, grads.x)


def _input_gradient(
    call: Call,
    grid: "_Grid",
    x: Tensor,
    factor: Tensor | None,
    dy: Tensor,
    total: Tensor,
    product: Tensor,
    grad_x: Tensor,
) -> None:
    """Second pass: dx = γ·factor·(dy - Σdy/n - (x - μ)·Σdy(x - μ)/(n·σ·(σ + ε))), the last two in training alone."""
    steps = call.timesteps if call.shared else 1  # of dy that fall on one value of x
    if call.shared:
        dy = dy.float().sum(0, keepdim=True)
    if factor is None:
        if dy.data_ptr() != grad_x.data_ptr():
            in_order(grad_x, grid.order).copy_(dy)
        return
    slope = factor.double() * (1 if call.weight is None else call.weight)
    offset, tilt = torch.zeros_like(slope), torch.zeros_like(slope)
    if call.training:
        n = call.timesteps * grid.positions
        tiny = torch.finfo(torch.float32).tiny
        std = call.var.clamp_min(tiny).sqrt().double()
        offset = -steps * slope * total / n
        tilt = torch.where(call.var < tiny, 0.0, -steps * slope * product / ((std + call.eps) * n * std))
    _finish[grid.tiles](
        dy, x, call.mean, slope.float(), offset.float(), tilt.float(), grad_x,
        len(x), grid.positions, grid.channels, grid.inner, grid.step,
        LEVELS=0, BLOCK_C=grid.block_c, **EXACT,
    )  # fmt: skip


# A fused multiply-add rounds once where the reference rounds twice, and a spike is a step.
EXACT = {} if INTERPRETED else {"enable_fp_fusion": False}


class _Grid:
    """One time step of a call as positions × channels, and how programs divide it."""

    def __init__(self, call: Call):
        x = call.x
        self.order = call.channels_last
        self.step = x[0].numel()
        self.channels = x.shape[2] if call.norm else 1
        self.inner = x.shape[3] * x.shape[4] if call.norm and not self.order else 1
        self.positions = self.step // max(1, self.channels)
        self.x_stride = 0 if call.shared else self.step
        self.slots = triton.next_power_of_2(max(1, len(call.thresholds)))
        # Neighbours in memory belong to one tile: channels of channels-last data, positions of the other.
        self.block_c = 1 if self.inner > 1 else min(64, triton.next_power_of_2(self.channels))

    def place(self, x: Tensor | None) -> Tensor | None:
        return None if x is None else in_order(x, self.order)

    def tiles(self, meta: dict) -> tuple[int, int]:
        """One program for each tile."""
        block_p = meta["TILE"] // self.block_c
        return triton.cdiv(self.positions, block_p), triton.cdiv(self.channels, self.block_c)

    def programs(self, timesteps: int, slots: int) -> tuple[int, int]:
        """Programs that loop over tiles: all channels × as many as their memory for membranes allows."""
        blocks = triton.cdiv(self.channels, self.block_c)
        memory = 4 * timesteps * slots * MOST_TILE
        most = min(PROGRAMS, SCRATCH_BYTES // memory if memory else PROGRAMS)
        useful = triton.cdiv(self.positions, SHAPES[0][0] // self.block_c)
        return blocks, max(1, min(most // blocks, useful))


@functools.lru_cache
def _thresholds(thresholds: tuple[float, ...], slots: int, device: torch.device) -> Tensor:
    """θ on the device, padded by levels that never fire; kept, since a copy to the device would wait for it."""
    return torch.tensor([*thresholds, *[float("inf")] * (slots - len(thresholds))], dtype=torch.float32, device=device)


_ops = FusedOps("tdbn_mlf_triton", _forward_pass, _backward_pass, device_types=None)
mlf, tdbn, tdbn_mlf = _ops.mlf, _ops.tdbn, _ops.tdbn_mlf
