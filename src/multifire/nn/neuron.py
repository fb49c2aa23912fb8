"""A layer of neurons as a module, and streaming: running layers of neurons one time step at a time."""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from multifire import ops
from multifire.config import neurons
from multifire.ops.checks import check_numbers

Membranes = dict[str, Tensor]
"""Name of each layer of neurons -> its membranes after the reset: [K, N, C, H, W], or [1, N, C, H, W] if shared."""


class Stream:
    """The state of all layers of neurons during one time step, by the name of the layer.

    Args:
        network: the module whose layers run in this step.
        before: membranes of the step before; None at the first step.
    """

    def __init__(self, network: nn.Module, before: Membranes | None):
        self._names: dict[nn.Module, str] = {
            module: name for name, module in network.named_modules() if isinstance(module, Streaming)
        }
        self._before = before
        self._after: Membranes = {}

    def take(self, layer: nn.Module) -> Tensor | None:
        """Return the layer's membranes of the step before; None at the first step.

        Raises:
            ValueError: the state has no membranes for this layer.
        """
        if self._before is None:
            return None
        name = self._name(layer)
        if name not in self._before:
            raise ValueError(f"the state has no layer {name!r}; pass the state that the same network returned")
        return self._before[name]

    def put(self, layer: nn.Module, state: Tensor) -> None:
        """Store the layer's new membranes.

        Raises:
            ValueError: the layer ran twice in this step.
        """
        name = self._name(layer)
        if name in self._after:
            raise ValueError(f"the layer {name!r} ran twice in one step; every call needs neurons of its own")
        self._after[name] = state

    def after(self) -> Membranes:
        """Return the new membranes of all layers.

        Raises:
            ValueError: the state has a layer that did not run in this step.
        """
        for name in self._before or {}:
            if name not in self._after:
                raise ValueError(
                    f"the state has a layer {name!r} that did not run in this step; "
                    "pass the state that the same network returned"
                )
        return self._after

    def _name(self, layer: nn.Module) -> str:
        if layer not in self._names:
            raise ValueError(f"a layer of the stream is no submodule of the network that runs: {layer}")
        return self._names[layer]


class Streaming(nn.Module):
    """Base class of layers and blocks that can run frame by frame: `forward(x, stream)` uses the stream's state."""

    def step(self, frame: Tensor, state: Membranes | None = None) -> tuple[Tensor, Membranes]:
        """Compute one time step; layers with norms must be in evaluation mode. Gradients are recorded.

        T steps from state None give the same as one call on the T frames.

        Args:
            frame: the input without its first dimension T.
            state: membranes of the step before; None at the first step.

        Returns:
            The output for this frame, and the state for the next step.
        """
        stream = Stream(self, state)
        out = self(frame.unsqueeze(0), stream)
        return out.squeeze(0), stream.after()


class MLF(Streaming):
    """A layer of multi-level firing neurons: currents [T, ...] -> spikes [T, ...], integers in 0..K.

        u_k[t] = decay · u_k[t-1] · (1 - s_k[t-1]) + x[t],   s_k[t] = 1 if u_k[t] > θ_k else 0,   o[t] = Σ_k s_k[t]

    Without a stream, membranes start at zero in every call, so there is no state to reset. `membranes`, `reset` and
    `signed` give the neurons that took up the idea; see `multifire.ops.mlf`, and `MSF`, `ILIF` and `Ternary`.

    Learned thresholds are sums of positive gaps, which keeps them in order, and a learned decay stays between 0 and 1:

        θ_k = Σ_{j <= k} softplus(raw_thresholds_j),   decay = σ(raw_decay)

    Args:
        thresholds: θ, one for each of the K levels; where they are learned, those at the start.
        decay: factor of the membrane from one time step to the next; where it is learned, that at the start.
        learn_thresholds: learn θ, as a parameter of K numbers.
        learn_decay: learn decay, as a parameter of one number.
        membranes: "own": each level has its own membrane; "shared": all levels have one.
        reset: "zero", "subtract" or "any": what a spike does to its membrane.
        signed: levels also fire -1, where -u_k > θ_k.
        surrogate: the derivative of a spike in the backward pass: "rect", "triangle", "atan", "sigmoid", "gaussian" or
            a name that `multifire.register_surrogate` has registered.
        width: width a of the surrogate.
        detach_reset: no gradient through the spikes in the reset; the gradient through u_k[t-1] remains.
        backend: "auto" or a name in `multifire.ops.BACKENDS`.

    Raises:
        ValueError: a tensor as thresholds or decay, values that cannot be learned, or options that do not go together.

    Source: Feng et al., IJCAI 2022, eq. 5-7.
    """

    def __init__(
        self,
        thresholds: Sequence[float] = ops.PAPER_THRESHOLDS,
        decay: float = 0.25,
        *,
        learn_thresholds: bool = False,
        learn_decay: bool = False,
        membranes: str = "own",
        reset: str = "zero",
        signed: bool = False,
        surrogate: str = "rect",
        width: float = 1.0,
        detach_reset: bool = False,
        backend: str = "auto",
    ):
        super().__init__()
        check_numbers(thresholds, decay)
        neurons.check_dynamics(thresholds, reset, membranes, signed)
        neurons.check_learnable(thresholds, decay, learn_thresholds, learn_decay)
        neurons.check_surrogate(surrogate)
        self.initial_thresholds = tuple(thresholds)
        self.initial_decay = decay
        self.membranes = membranes
        self.reset = reset
        self.signed = signed
        self.surrogate = surrogate
        self.width = width
        self.detach_reset = detach_reset
        self.backend = backend
        self.raw_thresholds = nn.Parameter(_raw_gaps(thresholds)) if learn_thresholds else None
        self.raw_decay = nn.Parameter(torch.tensor(math.log(decay / (1 - decay)))) if learn_decay else None

    @property
    def levels(self) -> int:
        """Number of levels K."""
        return len(self.initial_thresholds)

    @property
    def thresholds(self) -> tuple[float, ...]:
        """θ as numbers: the learned ones, if they are learned. On a GPU the host waits for them."""
        learned = self.learned_thresholds()
        return self.initial_thresholds if learned is None else tuple(learned.tolist())

    @property
    def decay(self) -> float:
        """Decay as a number: the learned one, if it is learned. On a GPU the host waits for it."""
        learned = self.learned_decay()
        return self.initial_decay if learned is None else learned.item()

    @property
    def is_mlf(self) -> bool:
        """True for the paper's neuron: own membranes, reset to zero, that fires upwards only."""
        return self.membranes == "own" and self.reset == "zero" and not self.signed

    @property
    def is_learned(self) -> bool:
        """True if thresholds or decay are learned."""
        return self.raw_thresholds is not None or self.raw_decay is not None

    def learned_thresholds(self) -> Tensor | None:
        """Return the learned θ [K], or None if they are constants."""
        return None if self.raw_thresholds is None else F.softplus(self.raw_thresholds).cumsum(0)

    def learned_decay(self) -> Tensor | None:
        """Return the learned decay [], or None if it is a constant."""
        return None if self.raw_decay is None else self.raw_decay.sigmoid()

    def options(self) -> dict:
        """Return the neuron's keyword arguments of an op."""
        return {
            "thresholds": self.initial_thresholds,
            "decay": self.initial_decay,
            "learned_thresholds": self.learned_thresholds(),
            "learned_decay": self.learned_decay(),
            "membranes": self.membranes,
            "reset": self.reset,
            "signed": self.signed,
            "surrogate": self.surrogate,
            "width": self.width,
            "detach_reset": self.detach_reset,
            "backend": self.backend,
        }

    def refuse_other_members(self, what: str) -> None:
        """Raise a ValueError if this is not the paper's neuron, the only one that `what` can express."""
        changed = {"membranes": self.membranes, "reset": self.reset, "signed": self.signed}
        paper = {"membranes": "own", "reset": "zero", "signed": False}
        found = ", ".join(f"{name}={value!r}" for name, value in changed.items() if value != paper[name])
        if found:
            raise ValueError(f"{what} knows the MLF neuron alone, found {found}; see docs/neurons.md")

    def forward(self, x: Tensor, stream: Stream | None = None) -> Tensor:
        spikes, state = ops.mlf(x, **self.options(), state=stream and stream.take(self))
        if stream is not None:
            stream.put(self, state)
        return spikes

    def extra_repr(self) -> str:
        learned = [name for name in ("thresholds", "decay") if getattr(self, f"raw_{name}") is not None]
        dynamics = "" if self.is_mlf else f", membranes={self.membranes!r}, reset={self.reset!r}, signed={self.signed}"
        return (
            f"thresholds={self.initial_thresholds}, decay={self.initial_decay}, surrogate={self.surrogate!r}, "
            f"width={self.width}{dynamics}" + (f", learned: {' and '.join(learned)}" if learned else "")
        )


def _raw_gaps(thresholds: Sequence[float]) -> Tensor:
    """Return the numbers whose softplus are the gaps between 0 and ascending thresholds."""
    gaps = [above - below for below, above in pairwise((0.0, *thresholds))]
    return torch.tensor([gap + math.log(-math.expm1(-gap)) for gap in gaps])


class MSF(MLF):
    """Multi-synaptic firing neurons, [T, ...]: one membrane with K thresholds, set to zero if any level fires.

        u[t] = decay · u[t-1] · 1[o[t-1] = 0] + x[t],   o[t] = Σ_k 1[u[t] > θ_k]

    The arguments are those of `MLF`. The published neuron also fires at u = θ_k.

    Source: Fan et al., "A multisynaptic spiking neuron for simultaneously encoding spatiotemporal dynamics", Nature
    Communications 16, 7155 (2025).
    """

    def __init__(self, thresholds: Sequence[float] = ops.PAPER_THRESHOLDS, decay: float = 0.25, **options: Any):
        super().__init__(thresholds, decay, membranes="shared", reset="any", **options)


class ILIF(MLF):
    """Integer leaky integrate-and-fire neurons, [T, ...]: one membrane, rounded to an integer, which is subtracted.

        u[t] = decay · (u[t-1] - o[t-1]) + x[t],   o[t] = round(clip(u[t], 0, K))

    as K levels with thresholds 1/2, 3/2, ...; they differ where u is a threshold, since this neuron fires above it.
    With width 1 the windows of the surrogate "rect" adjoin and make up the published window 0 < u < K. Other arguments
    are those of `MLF`. SDT-V3 divides o by K, which belongs to the next layer's weights.

    Source: Luo et al., "Integer-valued training and spike-driven inference spiking neural network for high-performance
    and energy-efficient object detection" (SpikeYOLO), ECCV 2024; Yao et al., "Scaling spike-driven transformer with
    efficient spike firing approximation training" (Spike-driven Transformer V3), IEEE TPAMI 2025.
    """

    def __init__(self, levels: int = 4, decay: float = 0.25, **options: Any):
        super().__init__(ops.default_thresholds(levels, 0.5), decay, membranes="shared", reset="subtract", **options)


class Ternary(MLF):
    """Ternary neurons, [T, ...]: spikes -1, 0 and 1, and a reset to zero.

        u[t] = decay · u[t-1] · (1 - |o[t-1]|) + x[t],   o[t] = sign(u[t]) · 1[|u[t]| > θ]

    Other arguments are those of `MLF`. The published neuron also fires at |u| = θ.

    Source: Guo et al., "Ternary spike: learning ternary spikes for spiking neural networks", AAAI 2024.
    """

    def __init__(self, threshold: float = 0.5, decay: float = 0.25, **options: Any):
        super().__init__((threshold,), decay, signed=True, **options)
