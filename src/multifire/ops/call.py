"""What a fused backend gets and provides: the arguments of a call, the gradients to fill, its four passes.

Shapes: T time steps, K levels, N samples, C channels, H rows, W columns.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from multifire.ops import reference


class Call(NamedTuple):
    """The arguments of one call. A static x has one time step, which stands for `timesteps` equal ones."""

    x: Tensor
    weight: Tensor | None
    bias: Tensor | None
    mean: Tensor
    """Mean and variance [C] of the norm, contiguous; empty without a norm; filled by the forward pass in training."""
    var: Tensor
    add_before: Tensor | None
    add_after: Tensor | None
    state: Tensor | None
    learned_thresholds: Tensor | None
    """θ [K] and decay [] that get gradients; None: the numbers below."""
    learned_decay: Tensor | None
    timesteps: int
    training: bool
    sync: bool
    """True: statistics over the samples of all processes."""
    eps: float
    scale: float
    thresholds: Sequence[float]
    """Empty: the norm alone."""
    decay: float
    surrogate: str
    width: float
    detach_reset: bool
    reset: str
    membranes: str
    signed: bool

    @property
    def is_mlf(self) -> bool:
        """True for the neuron of the paper: own membranes, reset to zero, that fires upwards only."""
        return self.membranes == "own" and self.reset == "zero" and not self.signed

    @property
    def is_learned(self) -> bool:
        """True if thresholds or decay are learned."""
        return self.learned_thresholds is not None or self.learned_decay is not None

    @property
    def norm(self) -> bool:
        return self.mean.numel() > 0

    @property
    def is_static(self) -> bool:
        """True if x has one time step, which stands for all."""
        return self.x.shape[0] < self.timesteps

    @property
    def channels_last(self) -> bool:
        return is_channels_last(self.x)

    @property
    def values(self) -> int:
        """Values per channel of this process's x; a static x counts once for each time step."""
        return self.timesteps * self.x.shape[1] * self.x.shape[3] * self.x.shape[4]


class Gradients(NamedTuple):
    """Tensors to fill, x first; None for gradients that are not needed."""

    x: Tensor
    weight: Tensor | None
    bias: Tensor | None
    add_before: Tensor | None
    state: Tensor | None
    learned_thresholds: Tensor | None
    learned_decay: Tensor | None


class Backend(NamedTuple):
    """The four passes over the data that make up a fused backend, and the update of running statistics."""

    measure: Callable[[Call], Any]
    """Fills the call's mean and variance with those of its x."""
    forward: Callable[[Call, Tensor, Tensor | None, Any], None]
    """Fills out [T, N, C, H, W] and, unless None, the state [K or 1, N, C, H, W]; gets the result of `measure`."""
    backward: Callable[[Call, Tensor, Tensor | None, Gradients, Tensor], Any]
    """Fills the gradients from those of out and of the state, and with a norm grad_sums [2, C] float64 with Σ dy and
    Σ dy·(x - μ). In training the gradient of x is left to `finish`."""
    finish: Callable[[Call, Gradients, Tensor, float, Any], None]
    """In training: fills the gradient of x from grad_sums, the number of values per channel that they are over, and the
    result of `backward`."""
    move_running: Callable[[Tensor, Tensor, Tensor, Tensor, int | Tensor, float], None] = reference.move_running
    """Like the reference's; called only if torch's ops need not be seen."""


def is_channels_last(x: Tensor) -> bool:
    """Return True if x [T, N, C, H, W] lies in channels-last memory."""
    return x.dim() == 5 and not x.is_contiguous() and x.stride(2) == 1


def to_layout(x: Tensor, channels_last: bool) -> Tensor:
    """Return x as a contiguous tensor [..., H, W, C] if channels_last, else [..., C, H, W]."""
    return (x.permute(0, 1, 3, 4, 2) if channels_last else x).contiguous()
