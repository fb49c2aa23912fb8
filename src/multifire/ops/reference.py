"""The neuron's arithmetic in plain PyTorch: the definition that every other backend is tested against.

Shapes: T time steps, K levels, N samples, C channels, H rows, W columns; [...] is any shape.
Source: Feng et al., "Multi-Level Firing with Spiking DS-ResNet", IJCAI 2022.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from multifire.ops import collective, surrogates


class Fire(torch.autograd.Function):
    """Step function: 1 where v > 0; its backward pass uses the surrogate derivative at v."""

    @staticmethod
    def forward(ctx, v: Tensor, surrogate: str, width: float) -> Tensor:
        ctx.save_for_backward(v)
        ctx.surrogate, ctx.width = surrogate, width
        return (v > 0).to(v.dtype)

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor, None, None]:
        (v,) = ctx.saved_tensors
        return grads[0] * surrogates.derivative(ctx.surrogate, v, ctx.width), None, None


def why_not(x: Tensor, levels: int) -> str | None:
    """Return why this backend cannot compute x. None: the reference can compute every tensor."""


def mlf(
    x: Tensor,
    thresholds: Sequence[float],
    decay: float,
    *,
    surrogate: str,
    width: float,
    detach_reset: bool,
    state: Tensor | None,
    reset: str = "zero",
    membranes: str = "own",
    signed: bool = False,
    learned_thresholds: Tensor | None = None,
    learned_decay: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Firing over time of a neuron of the family; see `multifire.ops.mlf`.

    Tensors have K levels in front, and membranes K or, if the levels share one, 1. `carry` is what the membranes keep
    after the reset: it is differentiated with respect to u, θ and the spikes; with detach_reset, not to the spikes.
    """
    currents = _wide(x)
    theta = _thresholds(currents, thresholds, learned_thresholds)
    beta = decay if learned_decay is None else learned_decay.to(currents.dtype)
    rows = 1 if membranes == "shared" else len(thresholds)
    carry = currents.new_zeros(rows, *x.shape[1:]) if state is None else state.to(currents.dtype)
    spikes = []
    for current in currents.unbind(0):
        u = beta * carry + current
        s = f = Fire.apply(u - theta, surrogate, width)
        if signed:
            negative = Fire.apply(-u - theta, surrogate, width)
            s, f = s - negative, s + negative
        spikes.append(s.sum(0))
        if detach_reset:
            s, f = s.detach(), f.detach()
        carry = _after_reset(u, theta, s, f, reset, membranes)
    return torch.stack(spikes).to(x.dtype), carry


def _thresholds(like: Tensor, thresholds: Sequence[float], learned: Tensor | None) -> Tensor:
    """Return θ as a tensor [K, 1, ...] of the currents' type."""
    ones = [1] * (like.dim() - 1)
    if learned is not None:
        return learned.to(like.dtype).view(-1, *ones)
    # Filled on the device: a CUDA graph cannot copy them from the host.
    return torch.stack([like.new_full(ones, threshold) for threshold in thresholds])


def _after_reset(u: Tensor, theta: Tensor, s: Tensor, f: Tensor, reset: str, membranes: str) -> Tensor:
    """Return what the membranes keep: u·(1 - f) if they are set to zero, else u less what the spikes stand for."""
    if reset == "zero":
        return u * (1 - f)
    if reset == "any":
        return u * (1 - f[:1])  # if any level fires, the lowest does
    if membranes == "own":
        return u - theta * s
    return u - s.sum(0, keepdim=True)


def tdbn(
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
    """Threshold-dependent batch norm, computed and returned in at least fp32; see `multifire.ops.tdbn`.

    `scale` is α·V_th: the currents get the deviation of the first threshold, V_th.
    """
    x = _wide(x)
    mean, var = running_mean, running_var
    if training:
        mean, var = _batch_statistics(x, sync, running_mean, running_var, momentum)
    y = (x - _per_channel(mean)) * _per_channel(norm_factor(var, eps, scale))
    if weight is not None:
        y = y * _per_channel(weight)
    if bias is not None:
        y = y + _per_channel(bias)
    return y


def tdbn_mlf(
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
    reset: str = "zero",
    membranes: str = "own",
    signed: bool = False,
    learned_thresholds: Tensor | None = None,
    learned_decay: Tensor | None = None,
    fire: Callable[..., tuple[Tensor, Tensor]] = mlf,
) -> tuple[Tensor, Tensor | None]:
    """Norm, sum, firing, sum; see `multifire.ops.tdbn_mlf`. `fire` computes `mlf`."""
    x = x.expand(timesteps, *x.shape[1:])
    y = _wide(x)
    if running_mean is not None and running_var is not None:
        norm = {"training": training, "sync": sync, "momentum": momentum, "eps": eps, "scale": scale}
        y = tdbn(x, weight, bias, running_mean, running_var, **norm)
    if add_before is not None:
        y = y + add_before
    spikes, state = fire(
        y, thresholds, decay, surrogate=surrogate, width=width, detach_reset=detach_reset, state=state, reset=reset,
        membranes=membranes, signed=signed, learned_thresholds=learned_thresholds, learned_decay=learned_decay,
    )  # fmt: skip
    if add_after is not None:
        spikes = spikes + add_after
    return spikes.to(x.dtype), state if return_state else None


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
    """Inference in int8: y = scale·sums + bias in fp32, firing, spikes and their sum as uint8; see
    `multifire.ops.mlf_uint8`.
    """
    y = sums * _per_channel(scale) + (_per_channel(bias) if bias.dim() == 1 else bias)
    y = y.expand(timesteps, *y.shape[1:])
    spikes, state = mlf(
        y, thresholds, decay, surrogate="rect", width=1.0, detach_reset=False, state=state, reset=reset,
        membranes=membranes,
    )  # fmt: skip
    spikes = spikes.to(torch.uint8)
    return spikes if add_after is None else spikes + add_after, state if return_state else None


def norm_factor(var: Tensor, eps: float, scale: float) -> Tensor:
    """Return scale / (sqrt(σ²) + ε). As in the authors' code, ε is added to the root, not to σ²."""
    return scale / (norm_root(var) + eps)


def norm_root(var: Tensor) -> Tensor:
    """Return sqrt(σ²), correctly rounded except on MPS; torch's own float32 root may be wrong in the last bit."""
    # The root has no derivative at 0, the variance of a constant channel. The clamp makes the gradient 0 there.
    clamped = var.clamp_min(torch.finfo(var.dtype).tiny)
    return clamped.sqrt() if var.is_mps else clamped.double().sqrt().to(var.dtype)  # MPS has no float64


def _wide(x: Tensor) -> Tensor:
    """Return x in fp32 or better: half precision is for storage only."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def _per_channel(v: Tensor) -> Tensor:
    return v.view(-1, 1, 1)


def _batch_statistics(
    x: Tensor, sync: bool, running_mean: Tensor, running_var: Tensor, momentum: float
) -> tuple[Tensor, Tensor]:
    """Return mean and biased variance [C] of x [T, N, C, H, W]; update the running ones in place."""
    n, over = x.numel() // x.shape[2], (0, 1, 3, 4)
    if sync:
        sums = collective.summed(torch.cat([x.sum(over), x.new_tensor([n])]))
        n = sums[-1].detach()
        mean = sums[:-1] / n
        var = collective.summed((x - _per_channel(mean)).square().sum(over)) / n
    else:
        var, mean = torch.var_mean(x, dim=over, correction=0)
    move_running(running_mean, running_var, mean, var, n, momentum)
    return mean, var


@torch.no_grad()
def move_running(
    running_mean: Tensor, running_var: Tensor, mean: Tensor, var: Tensor, values: int | Tensor, momentum: float
) -> None:
    """Update running statistics in place: r ← (1 - momentum)·r + momentum·batch, with the variance unbiased by n/(n-1).

    Args:
        running_mean: [C].
        running_var: [C].
        mean: the batch's mean [C].
        var: the batch's biased variance [C].
        values: n, values per channel of the batch.
        momentum: weight of the batch.
    """
    running_mean.lerp_(mean, momentum)
    running_var.lerp_(var * (values / (values - 1)), momentum)
