"""The MLF neuron as a module, and how any module over it is run one time step at a time."""

from collections.abc import Iterator, Sequence
from itertools import repeat

from torch import Tensor, nn

from multifire import ops

Membranes = tuple[Tensor, ...]


class Stream:
    """Hands each layer of neurons, in the order in which they are called, its membranes, and collects the new ones."""

    def __init__(self, before: Membranes | None):
        self._before: Iterator[Tensor | None] = repeat(None) if before is None else iter(before)
        self._after: list[Tensor] = []

    def take(self) -> Tensor | None:
        try:
            return next(self._before)
        except StopIteration:
            raise ValueError(
                f"the state holds {len(self._after)} layers, the network has more; "
                "pass the state that the same network returned"
            ) from None

    def put(self, state: Tensor) -> None:
        self._after.append(state)

    def after(self) -> Membranes:
        if isinstance(self._before, repeat) or next(self._before, None) is None:
            return tuple(self._after)
        raise ValueError(
            f"the state holds more layers than the network's {len(self._after)}; "
            "pass the state that the same network returned"
        )


class Streaming(nn.Module):
    """A module that can be run frame by frame: `forward(x, stream)` takes its membranes from the stream."""

    def step(self, frame: Tensor, state: Membranes | None = None) -> tuple[Tensor, Membranes]:
        """One time step: output for `frame` (shaped as the input without T) and the state for the next.

        T steps from state None give what one call on the T frames gives, in evaluation mode.
        """
        stream = Stream(state)
        out = self(frame.unsqueeze(0), stream)
        return out.squeeze(0), stream.after()


class MLF(Streaming):
    """Multi-level firing neurons, [T, ...] -> spikes [T, ...] in 0..K; see `multifire.ops.mlf` for the equation.

    Membranes start at zero in every call, so there is nothing to reset.
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
        """The keyword arguments that the neuron adds to an op."""
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
