"""What the Triton kernels have in common: tiles, the norm, firing, surrogates, and sums over all programs."""
# pyright: basic, reportGeneralTypeIssues=false, reportArgumentType=false, reportOperatorIssue=false
# pyright: reportIndexIssue=false, reportAttributeAccessIssue=false, reportAssignmentType=false
# A kernel's arguments are Triton's pointers and numbers, which have no annotations.

import triton
import triton.language as tl


@triton.jit
def surrogate_at(v, width, KIND: tl.constexpr):
    """Return the surrogate derivative at v; KIND is its position in SURROGATES of config/neurons.py."""
    if KIND == 0:
        h = tl.where(tl.abs(v) < width / 2, 1.0 / width, 0.0)
    elif KIND == 1:
        h = tl.maximum(1 - tl.abs(v) / width, 0.0) / width
    elif KIND == 2:
        z = 3.141592653589793 / width * v
        h = 1 / (width * (1 + z * z))
    elif KIND == 3:
        e = tl.exp(-4 / width * tl.abs(v))
        h = 4 / width * e / ((1 + e) * (1 + e))
    else:
        z = v / width
        h = tl.exp(-3.141592653589793 * (z * z)) / width
    return h


@triton.jit
def channel_numbers(BLOCK_C: tl.constexpr):
    return tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)


@triton.jit
def tile_at(block, c, positions, channels, inner, BLOCK_P: tl.constexpr):
    """Return the mask of a tile, and its offsets within one time step [outer, channels, inner]."""
    p = block * BLOCK_P + tl.arange(0, BLOCK_P)
    mask = (p < positions)[:, None] & (c < channels)[None, :]
    p = p.to(tl.int64)
    return mask, (p // inner * (channels * inner) + p % inner)[:, None] + (c * inner)[None, :]


@triton.jit
def load_tile(pointer, t, stride, at, mask):
    """Return a tile at time t in fp32, 0 outside the mask."""
    return tl.load(pointer + t * stride + at, mask, other=0.0).to(tl.float32)


@triton.jit
def root_of(var, c, channels):
    """Return sqrt(σ²) per channel, correctly rounded like reference.norm_root, and whether σ² is 0."""
    smallest = 1.1754943508222875e-38
    variance = tl.load(var + c, c < channels, other=1.0)
    return tl.sqrt_rn(tl.maximum(variance, smallest, propagate_nan=tl.PropagateNan.ALL)), variance < smallest


@triton.jit
def factor_of(var, c, channels, eps, scale):
    """Return scale / (sqrt(σ²) + ε) per channel; like torch, by a reciprocal and a product."""
    root, _ = root_of(var, c, channels)
    return tl.div_rn(tl.full(c.shape, 1.0, tl.float32), root + eps) * scale


@triton.jit
def per_channel(pointer, c, channels, otherwise, HAS: tl.constexpr):
    """Return one number per channel, as a row; `otherwise` without HAS."""
    if HAS:
        return tl.load(pointer + c, c < channels, other=otherwise)[None, :]
    return (tl.zeros_like(c).to(tl.float32) + otherwise)[None, :]


@triton.jit
def norm_numbers(mean, var, weight, bias, c, channels, eps, scale, NORM: tl.constexpr, WEIGHT: tl.constexpr,
          BIAS: tl.constexpr):  # fmt: skip
    """Return the numbers (μ, scale/(σ + ε), γ, β) of each channel, as rows."""
    mu = per_channel(mean, c, channels, 0.0, NORM)
    gain = tl.full([1, c.shape[0]], 1.0, tl.float32)
    if NORM:
        gain = factor_of(var, c, channels, eps, scale)[None, :]
    return mu, gain, per_channel(weight, c, channels, 1.0, WEIGHT), per_channel(bias, c, channels, 0.0, BIAS)


@triton.jit
def input_currents(x, before, begin, x_stride, step, at, mask, norm, SEGMENT: tl.constexpr, BEFORE: tl.constexpr):
    """Return, for each step of a segment, x - μ, and the neurons' input current: the norm of x plus `before`."""
    mu, gain, gamma, beta = norm
    centred = ()
    for i in tl.static_range(SEGMENT):
        centred = centred + (load_tile(x, begin + i, x_stride, at, mask) - mu,)
    currents = ()
    for i in tl.static_range(SEGMENT):
        y = centred[i] * gain * gamma + beta
        if BEFORE:
            y += load_tile(before, begin + i, step, at, mask)
        currents = currents + (y,)
    return centred, currents


@triton.jit
def load_states(state, step, at, mask, shape: tl.constexpr, ROWS: tl.constexpr, STATE: tl.constexpr):
    """Return a tile per membrane: the given state [ROWS, positions, channels], or zeros."""
    carries = ()
    for k in tl.static_range(ROWS):
        if STATE:
            carries = carries + (load_tile(state, k, step, at, mask),)
        else:
            carries = carries + (tl.zeros(shape, tl.float32),)
    return carries


@triton.jit
def thresholds_of(thresholds, LEVELS: tl.constexpr, LEARNED: tl.constexpr):
    """Return θ as a tuple: loaded from a tensor, or the given one."""
    if LEARNED:
        theta = ()
        for k in tl.static_range(LEVELS):
            theta = theta + (tl.load(thresholds + k),)
    else:
        theta = thresholds
    return theta


@triton.jit
def decay_of(decay, LEARNED: tl.constexpr):
    """Return the decay from a tensor, or the number."""
    if LEARNED:
        beta = tl.load(decay)
    else:
        beta = decay
    return beta


@triton.jit
def spikes_of(u, theta, SIGNED: tl.constexpr):
    """Return s of one level as a tile of 0, 1 and, if signed, -1."""
    s = tl.where(u > theta, 1.0, 0.0)
    if SIGNED:
        s -= tl.where(-u > theta, 1.0, 0.0)
    return s


@triton.jit
def unless_fires(u, theta, value, SIGNED: tl.constexpr):
    """Return the value, or 0 where a level fires."""
    kept = tl.where(u > theta, 0.0, value)
    if SIGNED:
        kept = tl.where(-u > theta, 0.0, kept)
    return kept


@triton.jit
def after_firing(u, o, theta, m: tl.constexpr, LEVELS: tl.constexpr, SHARED: tl.constexpr, SUBTRACT: tl.constexpr,
                 SIGNED: tl.constexpr):  # fmt: skip
    """Add the spikes of membrane m to o; return o and what the membrane keeps.

    It has level m, or all LEVELS if it is shared; then, if any of them fires, the first does.
    """
    FIRST: tl.constexpr = 0 if SHARED else m
    END: tl.constexpr = LEVELS if SHARED else m + 1
    cost = tl.zeros_like(u)
    for k in tl.static_range(FIRST, END):
        s = spikes_of(u, theta[k], SIGNED)
        o += s
        if SHARED:
            cost += s
        else:
            cost = theta[k] * s
    if SUBTRACT:
        kept = u - cost
    else:
        kept = unless_fires(u, theta[FIRST], u, SIGNED)
    return o, kept


@triton.jit
def compensated(total, error, value):
    """Add a value to Σ = total - error without rounding (Kahan 1965)."""
    y = value - error
    t = total + y
    return t, (t - total) - y


@triton.jit
def is_last(counter, programs):
    """Count this program; return True in the last one, which sees what the others stored."""
    tl.debug_barrier()  # all threads have stored
    return tl.atomic_add(counter, 1, sem="acq_rel") == programs - 1


@triton.jit
def added_up(parts, c, programs, channels, BLOCK_C: tl.constexpr, ROWS: tl.constexpr):
    """Return, for each channel, the two sums over programs of parts [2, programs, channels], in fp64."""
    first = tl.zeros([ROWS, BLOCK_C], tl.float64)
    second = tl.zeros([ROWS, BLOCK_C], tl.float64)
    for start in range(0, programs, ROWS):
        row = start + tl.arange(0, ROWS)
        mask = (row < programs)[:, None] & (c < channels)[None, :]
        at = parts + row[:, None] * channels + c[None, :]
        first += tl.load(at, mask, other=0.0, cache_modifier=".cg")  # not from L1: other programs stored them
        second += tl.load(at + programs * channels, mask, other=0.0, cache_modifier=".cg")
    return tl.sum(first, 0), tl.sum(second, 0)


@triton.jit
def sum_of_parts(parts, count, stride, ROWS: tl.constexpr):
    """Return the sum of `count` numbers in fp64, each `stride` after the one before."""
    total = tl.zeros([ROWS], tl.float64)
    for start in range(0, count, ROWS):
        row = start + tl.arange(0, ROWS)
        total += tl.load(parts + row * stride, row < count, other=0.0, cache_modifier=".cg")
    return tl.sum(total, 0)
