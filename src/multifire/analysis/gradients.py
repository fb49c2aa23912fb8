"""Norm of the gradient at each layer.

Shapes: T time steps, N samples, K classes.
"""

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from multifire.analysis.probe import Pairs, require_samples, undisturbed
from multifire.nn import ConvFire, SpikingResNet
from multifire.utils.device import autocast

Loss = Callable[[Tensor, Tensor], Tensor]
"""Sum of the samples' losses, from logits [T, N, K] and labels [N]; see `multifire.training.step.sum_of_losses`."""


@dataclass(frozen=True)
class Gradients:
    """Norms of the gradient of the mean loss, for each layer in order of computation."""

    loss: float
    names: list[str]
    weights: np.ndarray
    """‖∂L/∂w‖ of each layer's convolution."""
    activations: np.ndarray
    """‖∂L/∂o‖ of each layer's output, over all samples and time steps."""
    voting: float
    """‖∂L/∂w‖ of the voting layer."""

    @property
    def weight_ratio(self) -> float:
        """Norm of the last layer divided by that of the first; infinite or NaN if no gradient reaches the first."""
        return _ratio(self.weights)

    @property
    def activation_ratio(self) -> float:
        return _ratio(self.activations)


def mean_cross_entropy(logits_TNK: Tensor, y: Tensor) -> Tensor:
    """Return the cross entropy of the time-averaged logits, summed over samples: the paper's loss."""
    return F.cross_entropy(logits_TNK.mean(0), y, reduction="sum")


def measure_gradients(
    model: SpikingResNet, batches: Pairs, *, loss: Loss = mean_cross_entropy, precision: str = "fp32"
) -> Gradients:
    """Measure the norm of the mean loss's gradient at each layer, in training mode.

    The parameters' gradients and the running statistics do not change.

    Args:
        model: the network.
        batches: x [T, N, C, H, W] and y [N].
        loss: sum of the samples' losses.
        precision: "bf16" convolves under autocast.

    Raises:
        ValueError: no sample.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, ConvFire)}
    weights = {**{name: layer.conv.weight for name, layer in layers.items()}, "voting": model.voting.weight}
    total, samples = 0.0, 0
    sums = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    squares: dict[str, float] = {}
    with undisturbed(model, training=True), torch.enable_grad(), _learning(weights.values()):
        for x_TNCHW, y in batches:
            with _outputs(layers) as outputs, autocast(x_TNCHW.device, precision):
                logits_TNK = model(x_TNCHW, per_step=True)
            summed = loss(logits_TNK.to(torch.promote_types(logits_TNK.dtype, torch.float32)), y)
            found = torch.autograd.grad(summed, [*weights.values(), *outputs.values()])
            for name, grad in zip(weights, found, strict=False):
                sums[name] += grad
            for name, grad in zip(outputs, found[len(weights) :], strict=True):
                squares[name] = squares.get(name, 0.0) + _norm(grad) ** 2
            total, samples = total + summed.item(), samples + len(y)
    require_samples(samples)
    return Gradients(
        loss=total / samples,
        names=list(squares),
        weights=np.array([_norm(sums[name]) / samples for name in squares]),
        activations=np.array([math.sqrt(square) / samples for square in squares.values()]),
        voting=_norm(sums["voting"]) / samples,
    )


@contextlib.contextmanager
def _learning(weights: Iterable[nn.Parameter | Tensor]) -> Iterator[None]:
    """Compute gradients of frozen weights too."""
    before = [(weight, weight.requires_grad) for weight in weights]
    try:
        for weight, _ in before:
            weight.requires_grad_(True)
        yield
    finally:
        for weight, learns in before:
            weight.requires_grad_(learns)


@contextlib.contextmanager
def _outputs(layers: dict[str, ConvFire]) -> Iterator[dict[str, Tensor]]:
    """Collect the layers' outputs of the forward pass, not those that a checkpointed stage computes again."""
    outputs: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[[nn.Module, tuple, Tensor], None]:
        def note(_layer: nn.Module, _inputs: tuple, out: Tensor) -> None:
            outputs.setdefault(name, out)

        return note

    with contextlib.ExitStack() as stack:
        for name, layer in layers.items():
            stack.enter_context(layer.register_forward_hook(keep(name)))
        yield outputs


def _norm(grad: Tensor) -> float:
    return torch.linalg.vector_norm(grad, dtype=torch.promote_types(grad.dtype, torch.float32)).item()


def _ratio(norms: np.ndarray) -> float:
    with np.errstate(divide="ignore", invalid="ignore"):
        return float(norms[-1] / norms[0])
