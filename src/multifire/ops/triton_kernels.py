"""Triton kernels of the fused op; triton.py calls them.

A program works on tiles of BLOCK_P positions (of a sample's plane) × BLOCK_C channels, and takes each tile through all
time steps with the membranes of every level in registers. TILE = BLOCK_P · BLOCK_C.

Time is divided into segments of SEGMENT steps, which are unrolled: a segment's values are loaded together, so that the
GPU waits for memory once. SEGMENT divides the number of time steps. Levels are unrolled too: a tuple of LEVELS tiles
stays in registers, whereas a tile with a dimension of levels would be rearranged through shared memory.

Sums over positions and time are taken in fp32 within a thread and in fp64 across threads and programs, because many
GPUs compute fp64 at 1/64 of the rate of fp32. `measure` compensates its sums, whose error does not grow with their
length. The error of those in `backward` is at most (SEGMENT + number of segments that a thread adds) · 2⁻²⁴ · Σ|value|.
The last program to finish adds up the sums of all; always in the same order, so that a call gives the same bits.
"""
# pyright: basic, reportGeneralTypeIssues=false, reportArgumentType=false, reportOperatorIssue=false
# pyright: reportIndexIssue=false, reportAttributeAccessIssue=false, reportAssignmentType=false
# A kernel's arguments are Triton's pointers and numbers, which have no annotations.

import triton
import triton.language as tl

from multifire.ops.triton_parts import (
    added_up,
    after_firing,
    channel_numbers,
    compensated,
    decay_of,
    factor_of,
    input_currents,
    is_last,
    load_states,
    load_tile,
    norm_numbers,
    per_channel,
    root_of,
    spikes_of,
    sum_of_parts,
    surrogate_at,
    thresholds_of,
    tile_at,
    unless_fires,
)

SEGMENTS = (4, 5, 3, 2, 1)
"""Lengths of a segment; the first that divides T is used."""


@triton.jit(do_not_specialize=["values"])
def measure(x, parts, counters, mean, var, values, timesteps, positions, channels, inner, step,
            SEGMENT: tl.constexpr, BLOCK_C: tl.constexpr, TILE: tl.constexpr, ROWS: tl.constexpr):  # fmt: skip
    """Compute mean and biased variance per channel, from Σd and Σd², d = x - x₀; x₀ is the channel's first value.

    A segment's values are added up first, then compensated. The errors of μ and σ² are at most u·(|μ| + 8·mean|d|) and
    u·(σ² + 16·mean d²), with u = 2⁻²⁴.
    """
    BLOCK_P: tl.constexpr = TILE // BLOCK_C
    step = tl.cast(step, tl.int64)  # T steps may exceed 32 bits
    c = channel_numbers(BLOCK_C)
    programs = tl.num_programs(0)
    first = tl.load(x + c * inner, c < channels, other=0.0).to(tl.float32)
    total = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    total_error, square, square_error = total, total, total
    for block in range(tl.program_id(0), tl.cdiv(positions, BLOCK_P), programs):
        mask, at = tile_at(block, c, positions, channels, inner, BLOCK_P)
        for begin in range(0, timesteps, SEGMENT):
            segment = ()
            for i in tl.static_range(SEGMENT):
                segment = segment + (load_tile(x, begin + i, step, at, mask),)
            segment_total, segment_square = tl.zeros_like(total), tl.zeros_like(total)
            for i in tl.static_range(SEGMENT):
                d = tl.where(mask, segment[i] - first[None, :], 0.0)
                segment_total += d
                segment_square += d * d
            total, total_error = compensated(total, total_error, segment_total)
            square, square_error = compensated(square, square_error, segment_square)
    here = tl.program_id(0) * channels + c
    squares = parts + programs * channels
    tl.store(parts + here, tl.sum(total.to(tl.float64) - total_error.to(tl.float64), 0), c < channels)
    tl.store(squares + here, tl.sum(square.to(tl.float64) - square_error.to(tl.float64), 0), c < channels)
    if is_last(counters + tl.program_id(1), programs):
        n = tl.cast(values, tl.float64)
        sum_, sum_of_squares = added_up(parts, c, programs, channels, BLOCK_C, ROWS)
        tl.store(mean + c, (first.to(tl.float64) + sum_ / n).to(tl.float32), c < channels)
        variance = tl.maximum((sum_of_squares - sum_ * sum_ / n) / n, 0.0, propagate_nan=tl.PropagateNan.ALL)
        tl.store(var + c, variance.to(tl.float32), c < channels)


@triton.jit
def forward(x, mean, var, weight, bias, before, after, state, thresholds, out, state_out,
            eps, scale, decay, timesteps, positions, channels, inner, step, x_stride,
            NORM: tl.constexpr, WEIGHT: tl.constexpr, BIAS: tl.constexpr,
            BEFORE: tl.constexpr, AFTER: tl.constexpr, STATE: tl.constexpr, STATE_OUT: tl.constexpr,
            LEVELS: tl.constexpr, SHARED: tl.constexpr, SUBTRACT: tl.constexpr, SIGNED: tl.constexpr,
            LEARNED_THETA: tl.constexpr, LEARNED_DECAY: tl.constexpr,
            SEGMENT: tl.constexpr, BLOCK_C: tl.constexpr, TILE: tl.constexpr):  # fmt: skip
    """Compute norm, sum, firing, sum."""
    ROWS: tl.constexpr = 1 if SHARED else LEVELS
    theta, beta = thresholds_of(thresholds, LEVELS, LEARNED_THETA), decay_of(decay, LEARNED_DECAY)
    BLOCK_P: tl.constexpr = TILE // BLOCK_C
    step = tl.cast(step, tl.int64)  # T steps may exceed 32 bits
    x_stride = tl.cast(x_stride, tl.int64)
    c = channel_numbers(BLOCK_C)
    mask, at = tile_at(tl.program_id(0), c, positions, channels, inner, BLOCK_P)
    norm = norm_numbers(mean, var, weight, bias, c, channels, eps, scale, NORM, WEIGHT, BIAS)
    carries = load_states(state, step, at, mask, (BLOCK_P, BLOCK_C), ROWS, STATE)
    for begin in range(0, timesteps, SEGMENT):
        _, currents = input_currents(x, before, begin, x_stride, step, at, mask, norm, SEGMENT, BEFORE)
        for i in tl.static_range(SEGMENT):
            if LEVELS == 0:
                o = currents[i]
            else:
                o = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
            new_carries = ()
            for m in tl.static_range(ROWS):
                u = beta * carries[m] + currents[i]
                o, carry = after_firing(u, o, theta, m, LEVELS, SHARED, SUBTRACT, SIGNED)
                new_carries = new_carries + (carry,)
            carries = new_carries
            if AFTER:
                o += load_tile(after, begin + i, step, at, mask)
            tl.store(out + (begin + i) * step + at, o.to(out.dtype.element_ty), mask)
    if STATE_OUT:
        for m in tl.static_range(ROWS):
            tl.store(state_out + m * step + at, carries[m], mask)


@triton.jit
def _coefficients(sums, products, var, weight, coefficients, c, channels, eps, scale, values, repeats,
                  WEIGHT: tl.constexpr, TRAINING: tl.constexpr):  # fmt: skip
    """Store the numbers a, b, d per channel with which `finish` computes dx = a·dy + b + d·(x - μ).

    a = γ·factor,  b = -a·Σdy/n,  d = -a·Σdy(x - μ)/(n·σ·(σ + ε));  in evaluation b = d = 0.
    """
    here = c < channels
    slope = factor_of(var, c, channels, eps, scale).to(tl.float64)
    if WEIGHT:
        slope *= tl.load(weight + c, here, other=1.0)
    tl.store(coefficients + c, slope.to(tl.float32), here)
    if TRAINING:
        root, constant = root_of(var, c, channels)
        std = root.to(tl.float64)
        mean_slope = -slope * repeats / tl.cast(values, tl.float64)
        tilt = tl.where(constant, 0.0, mean_slope * products / ((std + eps) * std))
        tl.store(coefficients + channels + c, (mean_slope * sums).to(tl.float32), here)
        tl.store(coefficients + 2 * channels + c, tilt.to(tl.float32), here)


@triton.jit
def gradients_of_spikes(u, g, c, theta, width, m: tl.constexpr, LEVELS: tl.constexpr, SURROGATE: tl.constexpr,
                        THROUGH_RESET: tl.constexpr, SHARED: tl.constexpr, SUBTRACT: tl.constexpr,
                        SIGNED: tl.constexpr):  # fmt: skip
    """Return δ of membrane m at u, and ∂L/∂θ_k of its levels, for one time step; see `backward`."""
    FIRST: tl.constexpr = 0 if SHARED else m
    END: tl.constexpr = LEVELS if SHARED else m + 1
    of_thresholds = ()
    if not SHARED and not SUBTRACT and not SIGNED:  # the MLF neuron, in a form that needs fewer registers
        h = surrogate_at(u - theta[m], width, SURROGATE)
        gate = tl.where(u > theta[m], 0.0, 1.0)
        pull = g
        if THROUGH_RESET:
            gate -= u * h
            pull = g - u * c
        d = g * h + c * gate
        of_thresholds = (-h * pull,)
    else:
        if SUBTRACT:
            d = c
        else:
            d = unless_fires(u, theta[FIRST], c, SIGNED)
        for k in tl.static_range(FIRST, END):
            up, down = g, g
            if THROUGH_RESET:
                if SUBTRACT:
                    up = g - (c if SHARED else theta[k] * c)
                    down = up
                elif k == FIRST:
                    up, down = g - u * c, g + u * c
            up = surrogate_at(u - theta[k], width, SURROGATE) * up
            of_threshold = -up
            d += up
            if SIGNED:
                down = surrogate_at(-u - theta[k], width, SURROGATE) * down
                of_threshold += down
                d += down
            if SUBTRACT and not SHARED:
                of_threshold -= c * spikes_of(u, theta[k], SIGNED)
            of_thresholds = of_thresholds + (of_threshold,)
    return d, of_thresholds


@triton.jit(do_not_specialize=["values"])
def backward(x, mean, var, weight, bias, before, state, thresholds, grad_out, grad_state_out, scratch,
             dy_out, dy_static, grad_state, parts, counters, sums, grad_weight, grad_bias, coefficients,
             learned_parts, grad_thresholds, grad_decay,
             eps, scale, decay, width, values, repeats, timesteps, positions, channels, inner, step, x_stride,
             NORM: tl.constexpr, WEIGHT: tl.constexpr, BIAS: tl.constexpr, BEFORE: tl.constexpr, STATE: tl.constexpr,
             GRAD_STATE_OUT: tl.constexpr, GRAD_STATE: tl.constexpr, GRAD_WEIGHT: tl.constexpr,
             GRAD_BIAS: tl.constexpr, DY: tl.constexpr, STATIC: tl.constexpr, TRAINING: tl.constexpr,
             SURROGATE: tl.constexpr, THROUGH_RESET: tl.constexpr, LEVELS: tl.constexpr, SHARED: tl.constexpr,
             SUBTRACT: tl.constexpr, SIGNED: tl.constexpr, LEARNED_THETA: tl.constexpr, LEARNED_DECAY: tl.constexpr,
             GRAD_THETA: tl.constexpr, GRAD_DECAY: tl.constexpr, SEGMENT: tl.constexpr, SEGMENTED: tl.constexpr,
             BLOCK_C: tl.constexpr, TILE: tl.constexpr, ROWS: tl.constexpr):  # fmt: skip
    """First pass: recompute the membranes and run time backwards; dy, Σdy, Σdy·(x - μ), and what follows from these.

    With c = ∂L/∂(what a membrane u keeps) = decay·δ[t+1], and h⁺, h⁻ the surrogate at u - θ_k and, if signed, -u - θ_k:

        δ[t] = c·(1, or 0 where a spike set u to zero) + Σ_k (h⁺·g⁺ + h⁻·g⁻),   dy[t] = Σ δ[t] over membranes
        ∂L/∂θ_k = -Σ (h⁺·g⁺ - h⁻·g⁻),   ∂L/∂decay = Σ δ[t]·(what u[t-1] keeps)

    g⁺ and g⁻ are the gradients of a spike: g[t], less what it takes from the membrane; see csrc/family_pass.h.
    """
    MEMBRANES: tl.constexpr = 1 if SHARED else LEVELS
    OF_MEMBRANE: tl.constexpr = (LEVELS if SHARED else 1) if GRAD_THETA else 0  # thresholds of a membrane to learn
    theta, beta = thresholds_of(thresholds, LEVELS, LEARNED_THETA), decay_of(decay, LEARNED_DECAY)
    BLOCK_P: tl.constexpr = TILE // BLOCK_C
    step = tl.cast(step, tl.int64)  # T steps may exceed 32 bits
    x_stride = tl.cast(x_stride, tl.int64)
    c = channel_numbers(BLOCK_C)
    programs = tl.num_programs(0)
    norm = norm_numbers(mean, var, weight, bias, c, channels, eps, scale, NORM, WEIGHT, BIAS)
    total = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    product = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    segments = timesteps // SEGMENT
    program = (tl.program_id(1) * programs + tl.program_id(0)).to(tl.int64)
    place = tl.arange(0, BLOCK_P)[:, None] * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    memory = scratch + program * segments * (MEMBRANES * TILE) + place
    theta_totals = load_states(state, step, 0, False, (BLOCK_P, BLOCK_C), LEVELS if GRAD_THETA else 0, False)
    decay_total = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    for block in range(tl.program_id(0), tl.cdiv(positions, BLOCK_P), programs):
        mask, at = tile_at(block, c, positions, channels, inner, BLOCK_P)
        if SEGMENTED:
            tl.debug_barrier()  # the threads that load from `memory` may be others than those that store
            carries = load_states(state, step, at, mask, (BLOCK_P, BLOCK_C), MEMBRANES, STATE)
            for segment in range(segments):
                for m in tl.static_range(MEMBRANES):
                    tl.store(memory + (segment * MEMBRANES + m) * TILE, carries[m])
                begin = segment * SEGMENT
                _, currents = input_currents(x, before, begin, x_stride, step, at, mask, norm, SEGMENT, BEFORE)
                new_carries = ()
                for m in tl.static_range(MEMBRANES):
                    carry = carries[m]
                    for i in tl.static_range(SEGMENT):
                        u = beta * carry + currents[i]
                        _, carry = after_firing(u, u, theta, m, LEVELS, SHARED, SUBTRACT, SIGNED)
                    new_carries = new_carries + (carry,)
                carries = new_carries
            tl.debug_barrier()
        deltas = load_states(grad_state_out, step, at, mask, (BLOCK_P, BLOCK_C), MEMBRANES, GRAD_STATE_OUT)  # c
        static_total = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
        for later in range(segments):
            segment = segments - 1 - later
            begin = segment * SEGMENT
            grads = ()
            for i in tl.static_range(SEGMENT):
                grads = grads + (load_tile(grad_out, begin + i, step, at, mask),)
            centred, currents = input_currents(x, before, begin, x_stride, step, at, mask, norm, SEGMENT, BEFORE)
            dys = ()
            for i in tl.static_range(SEGMENT):
                if LEVELS == 0:
                    dys = dys + (grads[i],)
                else:
                    dys = dys + (tl.zeros([BLOCK_P, BLOCK_C], tl.float32),)
            new_deltas, new_thetas = (), ()
            segment_decay = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
            for m in tl.static_range(MEMBRANES):
                if SEGMENTED:
                    carry = tl.load(memory + (segment * MEMBRANES + m) * TILE)
                elif STATE:
                    carry = load_tile(state, m, step, at, mask)
                else:
                    carry = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
                membranes, carries_before = (), ()
                for i in tl.static_range(SEGMENT):
                    u = beta * carry + currents[i]
                    membranes, carries_before = membranes + (u,), carries_before + (carry,)
                    _, carry = after_firing(u, u, theta, m, LEVELS, SHARED, SUBTRACT, SIGNED)
                delta = deltas[m]
                of_membrane = ()
                thetas = load_states(state, step, 0, False, (BLOCK_P, BLOCK_C), OF_MEMBRANE, False)
                for j in tl.static_range(SEGMENT):
                    u = membranes[SEGMENT - 1 - j]
                    g = grads[SEGMENT - 1 - j]
                    d, steps = gradients_of_spikes(u, g, delta, theta, width, m, LEVELS, SURROGATE, THROUGH_RESET,
                                                   SHARED, SUBTRACT, SIGNED)  # fmt: skip
                    if GRAD_THETA:
                        new = ()
                        for k in tl.static_range(OF_MEMBRANE):
                            new = new + (thetas[k] + steps[k],)
                        thetas = new
                    if GRAD_DECAY:
                        segment_decay += d * carries_before[SEGMENT - 1 - j]
                    delta = beta * d
                    of_membrane = of_membrane + (d,)
                new_deltas, new_thetas = new_deltas + (delta,), new_thetas + thetas
                new_dys = ()
                for i in tl.static_range(SEGMENT):
                    new_dys = new_dys + (dys[i] + of_membrane[SEGMENT - 1 - i],)
                dys = new_dys
            deltas = new_deltas
            decay_total += segment_decay
            if GRAD_THETA:
                new = ()
                for k in tl.static_range(LEVELS):
                    new = new + (theta_totals[k] + new_thetas[k],)
                theta_totals = new
            segment_total = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
            segment_product = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
            for i in tl.static_range(SEGMENT):
                segment_total += dys[i]
                segment_product += dys[i] * centred[i]
                if DY:
                    tl.store(dy_out + (begin + i) * step + at, dys[i].to(dy_out.dtype.element_ty), mask)
            total += segment_total
            product += segment_product
            static_total += segment_total
        if STATIC:
            tl.store(dy_static + at, static_total, mask)
        if GRAD_STATE:
            for m in tl.static_range(MEMBRANES):
                tl.store(grad_state + m * step + at, deltas[m], mask)
    if NORM:
        here = tl.program_id(0) * channels + c
        products = parts + programs * channels
        tl.store(parts + here, tl.sum(total.to(tl.float64), 0), c < channels)
        tl.store(products + here, tl.sum(product.to(tl.float64), 0), c < channels)
        if is_last(counters + tl.program_id(1), programs):
            sum_dy, sum_product = added_up(parts, c, programs, channels, BLOCK_C, ROWS)
            tl.store(sums + c, sum_dy, c < channels)
            tl.store(sums + channels + c, sum_product, c < channels)
            if GRAD_WEIGHT:
                gradient = sum_product * factor_of(var, c, channels, eps, scale)
                tl.store(grad_weight + c, gradient.to(tl.float32), c < channels)
            if GRAD_BIAS:
                tl.store(grad_bias + c, sum_dy.to(tl.float32), c < channels)
            _coefficients(sum_dy, sum_product, var, weight, coefficients, c, channels, eps, scale, values,
                          repeats, WEIGHT, TRAINING)  # fmt: skip
    if GRAD_THETA or GRAD_DECAY:
        row = learned_parts + program * (LEVELS + 1)
        for k in tl.static_range(LEVELS if GRAD_THETA else 0):
            tl.store(row + k, tl.sum(theta_totals[k].to(tl.float64)))
        if GRAD_DECAY:
            tl.store(row + LEVELS, tl.sum(decay_total.to(tl.float64)))
        everyone = programs * tl.num_programs(1)
        if is_last(counters + tl.num_programs(1), everyone):
            for k in tl.static_range(LEVELS if GRAD_THETA else 0):
                tl.store(grad_thresholds + k, sum_of_parts(learned_parts + k, everyone, LEVELS + 1, 256).to(tl.float32))
            if GRAD_DECAY:
                total_of_decay = sum_of_parts(learned_parts + LEVELS, everyone, LEVELS + 1, 256)
                tl.store(grad_decay, total_of_decay.to(tl.float32))


@triton.jit(do_not_specialize=["values"])
def coefficients_of_sums(sums, var, weight, coefficients, eps, scale, values, repeats, channels,
                         WEIGHT: tl.constexpr, BLOCK_C: tl.constexpr):  # fmt: skip
    """Compute the coefficients of `finish` from sums over all processes."""
    c = channel_numbers(BLOCK_C)
    sum_dy = tl.load(sums + c, c < channels, other=0.0)
    sum_product = tl.load(sums + channels + c, c < channels, other=0.0)
    _coefficients(sum_dy, sum_product, var, weight, coefficients, c, channels, eps, scale, values, repeats,
                  WEIGHT, True)  # fmt: skip


@triton.jit
def finish(dy, x, mean, coefficients, dx, timesteps, positions, channels, inner, step,
           TRAINING: tl.constexpr, SEGMENT: tl.constexpr, BLOCK_C: tl.constexpr, TILE: tl.constexpr):  # fmt: skip
    """Second pass: dx = a·dy + b + d·(x - μ), with a, b, d of `_coefficients`. dx may overwrite dy."""
    BLOCK_P: tl.constexpr = TILE // BLOCK_C
    step = tl.cast(step, tl.int64)  # T steps may exceed 32 bits
    c = channel_numbers(BLOCK_C)
    mask, at = tile_at(tl.program_id(0), c, positions, channels, inner, BLOCK_P)
    slope = per_channel(coefficients, c, channels, 0.0, True)
    offset = per_channel(coefficients + channels, c, channels, 0.0, TRAINING)
    tilt = per_channel(coefficients + 2 * channels, c, channels, 0.0, TRAINING)
    mu = per_channel(mean, c, channels, 0.0, TRAINING)
    for begin in range(0, timesteps, SEGMENT):
        grads, values = (), ()
        for i in tl.static_range(SEGMENT):
            grads = grads + (load_tile(dy, begin + i, step, at, mask),)
            if TRAINING:
                values = values + (load_tile(x, begin + i, step, at, mask),)
        for i in tl.static_range(SEGMENT):
            result = slope * grads[i]
            if TRAINING:
                result += offset + tilt * (values[i] - mu)
            tl.store(dx + (begin + i) * step + at, result.to(dx.dtype.element_ty), mask)


@triton.jit
def pack(x, packed, values, BITS: tl.constexpr, TILE: tl.constexpr):
    """Store integers below 2^BITS in BITS bits each.

    Byte i of a block of TILE bytes holds the block's values i, TILE + i, 2·TILE + i, ..., the first in its lowest bits,
    so that neighbouring threads load and store neighbours.
    """
    WAYS: tl.constexpr = 8 // BITS
    block = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, TILE)
    byte = tl.zeros([TILE], tl.int32)
    for way in tl.static_range(WAYS):
        at = (block * WAYS + way) * TILE + place
        byte |= tl.load(x + at, at < values, other=0.0).to(tl.int32) << (way * BITS)
    tl.store(packed + block * TILE + place, byte.to(tl.uint8))


@triton.jit
def unpack(packed, x, values, BITS: tl.constexpr, TILE: tl.constexpr):
    """Fill x with the integers that `pack` stored."""
    WAYS: tl.constexpr = 8 // BITS
    block = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, TILE)
    byte = tl.load(packed + block * TILE + place).to(tl.int32)
    for way in tl.static_range(WAYS):
        at = (block * WAYS + way) * TILE + place
        value = (byte >> (way * BITS)) & ((1 << BITS) - 1)
        tl.store(x + at, value.to(tl.float32).to(x.dtype.element_ty), at < values)
