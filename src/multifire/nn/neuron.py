"""A layer of MLF neurons as a module, and streaming: running layers of neurons one time step at a time."""

from collections.abc import Iterator, Sequence
from itertools import repeat

from torch import Tensor, nn

from multifire import ops

Membranes = tuple[Tensor, ...]
"""Membrane potentials after reset, u_k·(1 - s_k), of each layer: [K, N, C, H, W]."""


class Stream:
    """The state of all layers during one time step.

    Each layer takes its membranes of the step before and puts its new ones, in the order in which layers are called.
    """

    def __init__(self, before: Membranes | None):
        self._before: Iterator[Tensor | None] = repeat(None) if before is None else iter(before)
        self._after: list[Tensor] = []

    def take(self) -> Tensor | None:
        """Return the next layer's membranes from the step before; None at the first step."""
        try:
            return next(self._before)
        except StopIteration:
            raise ValueError(
                f"the state holds {len(self._after)} layers, the network has more; "
                "pass the state that the same network returned"
            ) from None

    def put(self, state: Tensor) -> None:
        """Store a layer's new membranes."""
        self._after.append(state)

    def after(self) -> Membranes:
        """Return the new membranes of all layers.

        Raises:
            ValueError: the state had more layers than the network.
        """
        if isinstance(self._before, repeat) or next(self._before, None) is None:
            return tuple(self._after)
        raise ValueError(
            f"the state holds more layers than the network's {len(self._after)}; "
            "pass the state that the same network returned"
        )


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
        stream = Stream(state)
        out = self(frame.unsqueeze(0), stream)
        return out.squeeze(0), stream.after()


class MLF(Streaming):
    """A layer of multi-level firing neurons: currents [T, ...] -> spikes [T, ...], integers in 0..K.

        u_k[t] = decay · u_k[t-1] · (1 - s_k[t-1]) + x[t],   s_k[t] = 1 if u_k[t] > θ_k else 0,   o[t] = Σ_k s_k[t]

    Without a stream, membranes start at zero in every call, so there is no state to reset.

    Args:
        thresholds: θ, one for each of the K levels.
        decay: factor of the membrane from one time step to the next.
        surrogate: "rect", "triangle" or "atan": the derivative of a spike in the backward pass.
        width: width a of the surrogate.
        detach_reset: no gradient through s_k[t-1] in the reset 1 - s_k[t-1]; the gradient through u_k[t-1] remains.
        backend: "auto" or a name in `multifire.ops.BACKENDS`.

    Source: Feng et al., IJCAI 2022, eq. 5-7.
    """

    def __init__(
        self,
        thresholds: Sequence[float] = ops.PAPER_THRESHOLDS,
        decay: float = 0.25,
        *,
        surrogate: str = "rect",
        width: float = 1.0,
        detach_reset: bool = False,
        backend: str = "auto",
    ):
        super().__init__()
        self.thresholds = tuple(thresholds)
        self.decay = decay
        self.surrogate = surrogate
        self.width = width
        self.detach_reset = detach_reset
        self.backend = backend

    def options(self) -> dict:
        """Return the neuron's keyword arguments of an op."""
        return {
            "thresholds": self.thresholds,
            "decay": self.decay,
            "surrogate": self.surrogate,
            "width": self.width,
            "detach_reset": self.detach_reset,
            "backend": self.backend,
        }

    def forward(self, x: Tensor, stream: Stream | None = None) -> Tensor:
        spikes, state = ops.mlf(x, **self.options(), state=stream and stream.take())
        if stream is not None:
            stream.put(state)
        return spikes

    def extra_repr(self) -> str:
        return f"thresholds={self.thresholds}, decay={self.decay}, surrogate={self.surrogate!r}, width={self.width}"
