"""Triton kernels of the fused op; triton.py calls them.

A program takes a tile of P positions (of a sample's plane) × C channels through all time steps, with the membranes of
every level in registers.
"""
# pyright: basic, reportGeneralTypeIssues=false, reportArgumentType=false, reportOperatorIssue=false, reportIndexIssue=false
# A kernel's arguments are Triton's pointers and numbers, which have no annotations.

import functools
import os

import triton
import triton.language as tl

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# Elements of a tile, and warps that share them. The interpreter uses the first only.
SHAPES = [(256, 4), (512, 4), (1024, 4), (1024, 8)]
MAX_TILE = max(tile for tile, _ in SHAPES)
SEGMENT = 4
"""Time steps between stored membranes; recomputing those between is faster than storing and loading them."""
tuned = functools.partial(
    triton.autotune,
    [triton.Config({"TILE": tile}, num_warps=warps) for tile, warps in (SHAPES[:1] if INTERPRETED else SHAPES)],
    key=["channels", "inner", "timesteps", "LEVELS"],
)


@triton.jit
def _surrogate(v, width, KIND: tl.constexpr):
    """Return the surrogate derivative at v; KIND is the position in reference.SURROGATES."""
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
    """Return the offsets of positions p × channels c within one time step [outer, channels, inner]."""
    return (p // inner * (channels * inner) + p % inner)[:, None] + (c * inner)[None, :]


@triton.jit
def _root(var, c, channels):
    """Return sqrt(σ²) per channel, correctly rounded like reference.norm_root."""
    smallest = 1.1754943508222875e-38
    variance = tl.load(var + c, c < channels, other=1.0)
    return tl.sqrt_rn(tl.maximum(variance, smallest, propagate_nan=tl.PropagateNan.ALL)), variance < smallest


@triton.jit
def _factor(var, c, channels, eps, scale, HAS: tl.constexpr):
    """Return scale / (sqrt(σ²) + ε) per channel, as a row; like torch, by a reciprocal and a product."""
    if HAS:
        root, _ = _root(var, c, channels)
        return (tl.div_rn(tl.full(c.shape, 1.0, tl.float32), root + eps) * scale)[None, :]
    return (tl.zeros_like(c).to(tl.float32) + 1.0)[None, :]


@triton.jit
def _added_up(parts, c, programs, channels, BLOCK_C: tl.constexpr, ROWS: tl.constexpr):
    """Return the sum over programs for each channel, in float64."""
    total = tl.zeros([BLOCK_C], tl.float64)
    for start in range(0, programs, ROWS):
        row = start + tl.arange(0, ROWS)
        mask = (row < programs)[:, None] & (c < channels)[None, :]
        total += tl.sum(tl.load(parts + row[:, None] * channels + c[None, :], mask, other=0.0), 0)
    return total


@triton.jit
def _channel(pointer, c, channels, otherwise, HAS: tl.constexpr):
    """Return one number per channel, as a row."""
    if HAS:
        return tl.load(pointer + c, c < channels, other=otherwise)[None, :]
    return (tl.zeros_like(c).to(tl.float32) + otherwise)[None, :]


@triton.jit
def _current(x, before, t, x_stride, step, at, mask, mu, gain, gamma, beta, BEFORE: tl.constexpr):
    """Return the neurons' input current at time t: the norm of x plus `before`."""
    y = tl.load(x + t * x_stride + at, mask, other=0.0).to(tl.float32)
    y = (y - mu) * gain * gamma + beta
    if BEFORE:
        y += tl.load(before + t * step + at, mask, other=0.0).to(tl.float32)
    return y


@triton.jit
def _at_start(state, of_level, level_mask, STATE: tl.constexpr):
    """Return the membranes before the first step: the given state, or zeros."""
    if STATE:
        return tl.load(state + of_level, level_mask, other=0.0)
    return tl.zeros(of_level.shape, tl.float32)


@triton.jit
def _fire(carry, y, decay, theta):
    """Compute one time step of every level: membrane before firing, spikes, and membrane after the reset."""
    u = decay * carry + y[None, :, :]
    fires = u > theta
    return u, fires, tl.where(fires, 0.0, u)


@tuned()
@triton.jit
def stats(x, sums, squares, timesteps, positions, channels, inner, step,
           LEVELS: tl.constexpr, BLOCK_C: tl.constexpr, TILE: tl.constexpr):  # fmt: skip
    """Compute Σ(x - x₀) and Σ(x - x₀)² per program and channel in float64; x₀ is the channel's first value."""
    BLOCK_P: tl.constexpr = TILE // BLOCK_C
    step = tl.cast(step, tl.int64)  # T steps may exceed 32 bits
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    about = tl.load(x + c * inner, c < channels, other=0.0).to(tl.float32)[None, :]
    total = tl.zeros(
        [BLOCK_P, BLOCK_C], tl.float64
    )  # summed over threads once, at the end: every such sum waits for all threads
    square = tl.zeros([BLOCK_P, BLOCK_C], tl.float64)
    for block in range(tl.program_id(1), tl.cdiv(positions, BLOCK_P), tl.num_programs(1)):
        p = block * BLOCK_P + tl.arange(0, BLOCK_P)
        mask = (p < positions)[:, None] & (c < channels)[None, :]
        at = _offsets(p.to(tl.int64), c, channels, inner)
        for t in range(timesteps):
            value = tl.load(x + t * step + at, mask, other=0.0).to(tl.float32)
            d = tl.where(mask, value - about, 0.0).to(tl.float64)
            total += d
            square += d * d
    here = tl.program_id(1) * channels + c
    tl.store(sums + here, tl.sum(total, 0), c < channels)
    tl.store(squares + here, tl.sum(square, 0), c < channels)


@triton.jit(do_not_specialize=["programs", "values"])
def pool_statistics(x, sums, squares, mean, var, programs, values, channels, inner,
                     BLOCK_C: tl.constexpr, ROWS: tl.constexpr):  # fmt: skip
    """Compute mean and biased variance per channel from the sums of `stats`."""
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    about = tl.load(x + c * inner, c < channels, other=0.0).to(tl.float64)
    n = tl.cast(values, tl.float64)
    total = _added_up(sums, c, programs, channels, BLOCK_C, ROWS)
    square = _added_up(squares, c, programs, channels, BLOCK_C, ROWS)
    tl.store(mean + c, (about + total / n).to(tl.float32), c < channels)
    variance = tl.maximum((square - total * total / n) / n, 0.0, propagate_nan=tl.PropagateNan.ALL)
    tl.store(var + c, variance.to(tl.float32), c < channels)


@tuned()
@triton.jit
def forward(x, mean, var, weight, bias, before, after, state, thresholds, out, state_out,
             eps, scale, decay, timesteps, positions, channels, inner, step, x_stride,
             NORM: tl.constexpr, WEIGHT: tl.constexpr, BIAS: tl.constexpr,
             BEFORE: tl.constexpr, AFTER: tl.constexpr, STATE: tl.constexpr, STATE_OUT: tl.constexpr,
             LEVELS: tl.constexpr, SLOTS: tl.constexpr,
             BLOCK_C: tl.constexpr, TILE: tl.constexpr):  # fmt: skip
    """Compute norm, sum, firing, sum."""
    BLOCK_P: tl.constexpr = TILE // BLOCK_C
    step = tl.cast(step, tl.int64)  # T steps may exceed 32 bits
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
    gain = _factor(var, c, channels, eps, scale, NORM)
    gamma = _channel(weight, c, channels, 1.0, WEIGHT)
    beta = _channel(bias, c, channels, 0.0, BIAS)
    carry = _at_start(state, of_level, level_mask, STATE)
    for t in range(timesteps):
        y = _current(x, before, t, x_stride, step, at, mask, mu, gain, gamma, beta, BEFORE)
        if LEVELS == 0:
            o = y
        else:
            _, fires, carry = _fire(carry, y, decay, theta)
            o = tl.sum(tl.where(fires, 1.0, 0.0), 0)
        if AFTER:
            o += tl.load(after + t * step + at, mask, other=0.0).to(tl.float32)
        tl.store(out + t * step + at, o.to(out.dtype.element_ty), mask)
    if STATE_OUT:
        tl.store(state_out + of_level, carry, level_mask)


@tuned()
@triton.jit
def backward(x, mean, var, weight, bias, before, state, thresholds, grad_out, grad_state_out, scratch,
              dy_out, grad_state, sums, products, eps, scale, decay, width,
              timesteps, positions, channels, inner, step, x_stride,
              NORM: tl.constexpr, WEIGHT: tl.constexpr, BIAS: tl.constexpr,
              BEFORE: tl.constexpr, STATE: tl.constexpr, GRAD_STATE_OUT: tl.constexpr, GRAD_STATE: tl.constexpr,
              SEGMENT: tl.constexpr, SEGMENTED: tl.constexpr, SURROGATE: tl.constexpr,
              THROUGH_RESET: tl.constexpr, LEVELS: tl.constexpr, SLOTS: tl.constexpr, SLOT_SIZE: tl.constexpr,
              BLOCK_C: tl.constexpr, TILE: tl.constexpr):  # fmt: skip
    """First pass: recompute the membranes, then run time backwards; dy, and each program's Σdy and Σdy·(x - μ).

    δ_k[t] = g[t]·h_k[t] + δ_k[t+1]·decay·((1 - s_k[t]) - u_k[t]·h_k[t]),   dy[t] = Σ_k δ_k[t]
    """
    BLOCK_P: tl.constexpr = TILE // BLOCK_C
    step = tl.cast(step, tl.int64)  # T steps may exceed 32 bits
    x_stride = tl.cast(x_stride, tl.int64)
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    k = tl.arange(0, SLOTS)
    theta = tl.load(thresholds + k)[:, None, None]
    mu = _channel(mean, c, channels, 0.0, NORM)
    gain = _factor(var, c, channels, eps, scale, NORM)
    gamma = _channel(weight, c, channels, 1.0, WEIGHT)
    beta = _channel(bias, c, channels, 0.0, BIAS)
    total = tl.zeros([BLOCK_P, BLOCK_C], tl.float64)  # as in stats
    product = tl.zeros([BLOCK_P, BLOCK_C], tl.float64)
    program = (tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)).to(tl.int64)
    place = k[:, None, None] * (BLOCK_P * BLOCK_C) + tl.arange(0, BLOCK_P)[None, :, None] * BLOCK_C
    last = (timesteps - 1) // SEGMENT
    memory = scratch + program * (last + 1) * SLOT_SIZE + place + tl.arange(0, BLOCK_C)[None, None, :]
    for block in range(tl.program_id(1), tl.cdiv(positions, BLOCK_P), tl.num_programs(1)):
        p = block * BLOCK_P + tl.arange(0, BLOCK_P)
        mask = (p < positions)[:, None] & (c < channels)[None, :]
        at = _offsets(p.to(tl.int64), c, channels, inner)
        of_level = k.to(tl.int64)[:, None, None] * step + at[None, :, :]
        level_mask = (k < LEVELS)[:, None, None] & mask[None, :, :]
        if SEGMENTED:
            tl.debug_barrier()  # other threads may load the memory than stored it
            carry = _at_start(state, of_level, level_mask, STATE)
            for t in range(last * SEGMENT + 1):
                if t % SEGMENT == 0:
                    tl.store(memory + t // SEGMENT * SLOT_SIZE, carry)
                y = _current(x, before, t, x_stride, step, at, mask, mu, gain, gamma, beta, BEFORE)
                _, _, carry = _fire(carry, y, decay, theta)
            tl.debug_barrier()

        delta = tl.zeros([SLOTS, BLOCK_P, BLOCK_C], tl.float32)  # ∂L/∂carry
        if GRAD_STATE_OUT:
            delta = tl.load(grad_state_out + of_level, level_mask, other=0.0)
        for later in range(last + 1):
            begin = (last - later) * SEGMENT
            end = tl.minimum(begin + SEGMENT, timesteps)
            if SEGMENTED:
                start = tl.load(memory + (last - later) * SLOT_SIZE)
            else:
                start = _at_start(state, of_level, level_mask, STATE)
            for back in range(end - begin):
                t = end - 1 - back
                grad = tl.load(grad_out + t * step + at, mask, other=0.0).to(tl.float32)
                if LEVELS == 0:
                    dy = grad
                else:
                    carry = start
                    u = start
                    fires = start > theta
                    for s in range(begin, t + 1):
                        y = _current(x, before, s, x_stride, step, at, mask, mu, gain, gamma, beta, BEFORE)
                        u, fires, carry = _fire(carry, y, decay, theta)
                    h = _surrogate(u - theta, width, SURROGATE)
                    gate = tl.where(fires, 0.0, 1.0)
                    if THROUGH_RESET:
                        gate -= u * h
                    d = tl.where(level_mask, grad[None, :, :] * h + delta * gate, 0.0)
                    delta = decay * d
                    dy = tl.sum(d, 0)
                value = tl.load(x + t * x_stride + at, mask, other=0.0).to(tl.float32)
                total += dy.to(tl.float64)
                product += tl.where(mask, dy * (value - mu), 0.0).to(tl.float64)
                tl.store(dy_out + t * step + at, dy.to(dy_out.dtype.element_ty), mask)
        if GRAD_STATE:
            tl.store(grad_state + of_level, delta, level_mask)
    here = tl.program_id(1) * channels + c
    tl.store(sums + here, tl.sum(total, 0), c < channels)
    tl.store(products + here, tl.sum(product, 0), c < channels)


@triton.jit(do_not_specialize=["programs"])
def pool_sums(parts, products, var, sums, grad_weight, grad_bias, eps, scale, programs, channels,
               GRAD_WEIGHT: tl.constexpr, GRAD_BIAS: tl.constexpr,
               BLOCK_C: tl.constexpr, ROWS: tl.constexpr):  # fmt: skip
    """Add up Σdy and Σdy·(x - μ) over the programs of `backward`; compute the gradients of weight and bias."""
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    total = _added_up(parts, c, programs, channels, BLOCK_C, ROWS)
    product = _added_up(products, c, programs, channels, BLOCK_C, ROWS)
    tl.store(sums + c, total, c < channels)
    tl.store(sums + channels + c, product, c < channels)
    if GRAD_WEIGHT:
        gradient = product[None, :] * _factor(var, c, channels, eps, scale, True)
        tl.store(grad_weight + c[None, :], gradient.to(tl.float32), (c < channels)[None, :])
    if GRAD_BIAS:
        tl.store(grad_bias + c, total.to(tl.float32), c < channels)


@tuned(restore_value=["dy"])  # dx may overwrite dy, and tuning runs the kernel several times
@triton.jit(do_not_specialize=["values"])
def finish(dy, x, mean, var, weight, sums, dx, eps, scale, values, repeats,
            timesteps, positions, channels, inner, step,
            TRAINING: tl.constexpr, WEIGHT: tl.constexpr,
            LEVELS: tl.constexpr, BLOCK_C: tl.constexpr, TILE: tl.constexpr):  # fmt: skip
    """Second pass: dx = γ·factor·(dy - Σdy/n - (x - μ)·Σdy(x - μ)/(n·σ·(σ + ε))); in evaluation γ·factor·dy.

    `repeats` of the dy that were added up fall on one value of x.
    """
    BLOCK_P: tl.constexpr = TILE // BLOCK_C
    step = tl.cast(step, tl.int64)  # T steps may exceed 32 bits
    p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = (p < positions)[:, None] & (c < channels)[None, :]
    at = _offsets(p.to(tl.int64), c, channels, inner)
    slope = _factor(var, c, channels, eps, scale, True).to(tl.float64) * _channel(weight, c, channels, 1.0, WEIGHT)
    if TRAINING:
        root, constant = _root(var, c, channels)
        std = root.to(tl.float64)[None, :]
        share = -slope * repeats / tl.cast(values, tl.float64)
        offset = share * tl.load(sums + c, c < channels, other=0.0)[None, :]
        tilt = share * tl.load(sums + channels + c, c < channels, other=0.0)[None, :] / ((std + eps) * std)
        offset = offset.to(tl.float32)
        tilt = tl.where(constant[None, :], 0.0, tilt).to(tl.float32)
        mu = _channel(mean, c, channels, 0.0, True)
    slope = slope.to(tl.float32)
    for t in range(timesteps):
        out = slope * tl.load(dy + t * step + at, mask, other=0.0).to(tl.float32)
        if TRAINING:
            value = tl.load(x + t * step + at, mask, other=0.0).to(tl.float32)
            out += offset + tilt * (value - mu)
        tl.store(dx + t * step + at, out.to(dx.dtype.element_ty), mask)
