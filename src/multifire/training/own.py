"""What a user may replace in a training run, from Python."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from multifire import datasets

Loss = Callable[[Tensor, Tensor], Tensor]
"""Function of logits [T, N, L] and classes [N] that returns the mean loss of the samples."""
MakeOptimizer = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]


@dataclass(frozen=True)
class Own:
    """A network, data, a loss, an optimiser and a function of one's own; None: what the configuration says."""

    network: nn.Module | None = None
    """[T, N, C, H, W] -> logits of each time step [T, N, L]."""
    data: datasets.Dataset | None = None
    loss: Loss | None = None
    optimizer: MakeOptimizer | None = None
    """Makes the optimiser of the parameters. Its learning rate is the highest one of the schedule."""
    on_epoch: Callable[[dict[str, Any]], None] | None = None
    """Called after each epoch with its record, as in metrics.jsonl."""


NOTHING_OWN = Own()


def check_loss(loss: Tensor) -> Tensor:
    """Return the loss.

    Raises:
        ValueError: it is not a number.
    """
    if not isinstance(loss, Tensor) or loss.dim() != 0:
        found = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(f"the loss has shape {found}, expected a number: the mean loss of the samples")
    return loss
