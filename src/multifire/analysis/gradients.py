"""Measure the gradient norm at each layer.

Shapes: T time steps, N samples, C channels, H height, W width, L classes.
"""

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from multifire.analysis.probe import LabelledBatches, layers_of_neurons, preserve_state, require_samples
from multifire.nn import ConvFire, SpikingNetwork
from multifire.utils.device import autocast

Loss = Callable[[Tensor, Tensor], Tensor]
"""Function of logits [T, N, L] and labels [N] that returns the loss summed over samples, as
`multifire.training.step.sum_of_losses` does."""


@dataclass(frozen=True)
class Gradients:
    """Norms of the gradient of the mean loss, for each layer in order of computation."""

    loss: float
    """Mean loss L over the samples."""
    names: list[str]
    """Names of the layers."""
    weights: np.ndarray
    """‖∂L/∂w‖ for the weights of each layer's convolution; NaN for neurons without one."""
    activations: np.ndarray
    """‖∂L/∂o‖ for the output of each layer, over all samples and time steps."""
    voting: float
    """‖∂L/∂w‖ for the weights of the voting layer."""

    @property
    def weight_ratio(self) -> float:
        """Weight gradient norm of the last layer / first layer; infinite or NaN if the first one is 0."""
        return _ratio(self.weights[~np.isnan(self.weights)])

    @property
    def activation_ratio(self) -> float:
        """Activation gradient norm of the last layer / first layer; infinite or NaN if the first one is 0."""
        return _ratio(self.activations)


def mean_cross_entropy(logits_TNL: Tensor, y: Tensor) -> Tensor:
    """Return the paper's loss, summed over samples: the cross entropy of the time-averaged logits.

    Args:
        logits_TNL: logits of each time step [T, N, classes].
        y: the classes [N].
    """
    return F.cross_entropy(logits_TNL.mean(0), y, reduction="sum")


def measure_gradients(
    model: SpikingNetwork, batches: LabelledBatches, *, loss: Loss = mean_cross_entropy, precision: str = "fp32"
) -> Gradients:
    """Measure the norm of the mean loss's gradient at each layer, in training mode.

    Parameters, their `.grad` and running statistics do not change.

    Args:
        model: the network.
        batches: x [T, N, C, H, W] and labels y [N].
        loss: returns the loss summed over samples.
        precision: "bf16" runs convolutions under autocast.

    Raises:
        ValueError: there is no sample.
    """
    layers = layers_of_neurons(model)
    weights = {name: layer.conv.weight for name, layer in layers.items() if isinstance(layer, ConvFire)}
    weights["voting"] = model.voting.weight
    loss_sum, samples = 0.0, 0
    weight_grads = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    squared_norms: dict[str, float] = {}
    with preserve_state(model, training=True), torch.enable_grad(), _requiring_grad(weights.values()):
        for x_TNCHW, y in batches:
            with _layer_outputs(layers) as outputs, autocast(x_TNCHW.device, precision):
                logits_TNL = model(x_TNCHW, per_step=True)
            batch_loss = loss(logits_TNL.to(torch.promote_types(logits_TNL.dtype, torch.float32)), y)
            grads = torch.autograd.grad(batch_loss, [*weights.values(), *outputs.values()])
            for name, grad in zip(weights, grads, strict=False):
                weight_grads[name] += grad
            for name, grad in zip(outputs, grads[len(weights) :], strict=True):
                squared_norms[name] = squared_norms.get(name, 0.0) + _norm(grad) ** 2
            loss_sum, samples = loss_sum + batch_loss.item(), samples + len(y)
    require_samples(samples)
    return Gradients(
        loss=loss_sum / samples,
        names=list(squared_norms),
        weights=np.array(
            [_norm(weight_grads[name]) / samples if name in weight_grads else math.nan for name in squared_norms]
        ),
        activations=np.array([math.sqrt(squared_norm) / samples for squared_norm in squared_norms.values()]),
        voting=_norm(weight_grads["voting"]) / samples,
    )


@contextlib.contextmanager
def _requiring_grad(weights: Iterable[nn.Parameter | Tensor]) -> Iterator[None]:
    """Set requires_grad on all weights, so that frozen weights have a gradient too; restore it on exit."""
    saved_flags = [(weight, weight.requires_grad) for weight in weights]
    try:
        for weight, _ in saved_flags:
            weight.requires_grad_(True)
        yield
    finally:
        for weight, requires_grad in saved_flags:
            weight.requires_grad_(requires_grad)


@contextlib.contextmanager
def _layer_outputs(layers: Mapping[str, nn.Module]) -> Iterator[dict[str, Tensor]]:
    """Collect the output of each layer, by name, while the model runs inside the context."""
    outputs: dict[str, Tensor] = {}

    def save_as(name: str) -> Callable[[nn.Module, tuple, Tensor], None]:
        def save(_layer: nn.Module, _inputs: tuple, out: Tensor) -> None:
            # A checkpointed stage runs again in the backward pass; only the output of its first run is in the graph.
            outputs.setdefault(name, out)

        return save

    with contextlib.ExitStack() as stack:
        for name, layer in layers.items():
            stack.enter_context(layer.register_forward_hook(save_as(name)))
        yield outputs


def _norm(grad: Tensor) -> float:
    return torch.linalg.vector_norm(grad, dtype=torch.promote_types(grad.dtype, torch.float32)).item()


def _ratio(norms: np.ndarray) -> float:
    with np.errstate(divide="ignore", invalid="ignore"):
        return float(norms[-1] / norms[0])
