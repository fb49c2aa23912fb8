"""Dormant units, firing rates and membrane potentials of each layer.

Shapes: T time steps, K levels, N samples, C channels, H rows, W columns, B bins, M neurons of some samples.
"""

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from multifire import ops
from multifire.analysis.probe import Pairs, run, undisturbed
from multifire.nn import MLF, ConvFire
from multifire.ops.reference import SURROGATES

BIN = 0.1
"""Width of a bin; with the paper's thresholds, the surrogate's windows end at edges of bins."""
LOW = -2.0
AT_ONCE = 2**15
"""Neurons computed at once on a CPU, so that their membranes stay in the cache."""


@dataclass(frozen=True)
class Membranes:
    """Histogram of membrane potentials over samples, neurons and time steps: B equal bins from `low` to `high`."""

    low: float
    high: float
    counts: np.ndarray
    """[K, B]."""
    below: np.ndarray
    above: np.ndarray
    """[K]: values outside the bins."""


@dataclass(frozen=True)
class LayerActivity:
    name: str
    shape: tuple[int, int, int]
    """C, H, W of the layer's neurons."""
    dormant: float
    """Fraction of (sample, neuron) with surrogate derivative 0 at every level and time step."""
    rate: np.ndarray
    """[K, T]: fraction of (sample, neuron) that fire."""
    membranes: Membranes

    @property
    def neurons(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Activity:
    samples: int
    layers: list[LayerActivity]
    """In order of computation."""

    @property
    def dormant(self) -> float:
        """Fraction of dormant units over the neurons of all layers."""
        neurons = sum(layer.neurons for layer in self.layers)
        return sum(layer.dormant * layer.neurons for layer in self.layers) / neurons


def measure_activity(model: nn.Module, batches: Pairs, *, precision: str = "fp32", every: int = 1) -> Activity:
    """Measure dormant units, firing rates and membrane potentials of every layer of neurons, in the model's mode.

        dormant:  ∂s_k/∂u_k = 0 at every level k and every time step t

    In training mode norms use the statistics of each batch, and running statistics do not change. Membranes are
    computed again from each layer's input, since no backend keeps them; a membrane within rounding error of its
    threshold may count as fired although it did not fire.

    Args:
        model: any network of ConvFire layers.
        batches: x [T, N, C, H, W], all of the same T, and y [N], which is not used.
        precision: "bf16" convolves under autocast.
        every: use the membranes of every `every`-th neuron for the histograms, the slowest part.

    Raises:
        ValueError: no sample.
        FloatingPointError: a membrane is NaN.

    Source of the definition: Feng et al., IJCAI 2022.
    """
    with undisturbed(model), observed(model, every) as observation:
        run(model, batches, precision)
    return observation.result()


@contextlib.contextmanager
def observed(model: nn.Module, every: int) -> Iterator["Observation"]:
    """Observe every layer of neurons while the model runs."""
    observation = Observation(every)
    with contextlib.ExitStack() as stack:
        for name, layer in model.named_modules():
            if isinstance(layer, ConvFire):
                watch = _Watch(name, observation)
                stack.enter_context(layer.conv.register_forward_hook(watch.convolved))
                stack.enter_context(layer.register_forward_hook(watch.fired, with_kwargs=True))
        yield observation


class Observation:
    """Counts by layer."""

    def __init__(self, every: int):
        self._every = every
        self._layers: dict[str, _Counts] = {}

    def add(self, name: str, y_TNCHW: Tensor, neuron: MLF) -> None:
        if name not in self._layers:
            self._layers[name] = _Counts(y_TNCHW, neuron, self._every)
        self._layers[name].add(y_TNCHW)

    def result(self) -> Activity:
        layers = [counts.result(name) for name, counts in self._layers.items()]
        return Activity(next(iter(self._layers.values())).samples, layers)


class _Watch:
    """Recomputes the input current of a layer's neurons: convolution, norm, and the sum before firing."""

    def __init__(self, name: str, observation: Observation):
        self._name, self._observation = name, observation
        self._current: Tensor | None = None

    def convolved(self, _conv: nn.Module, _inputs: tuple, out: Tensor) -> None:
        self._current = out.detach()

    @torch.no_grad()
    def fired(self, layer: ConvFire, inputs: tuple[Tensor], kwargs: dict[str, Any], out: Tensor) -> None:
        assert self._current is not None
        current_TNCHW = self._current.unflatten(0, (-1, out.shape[1]))  # T, or 1 for a static image
        self._current = None
        weight, bias, mean, var = layer.norm.tensors()
        options = {**layer.norm.options(), "backend": layer.neuron.backend}
        y_TNCHW = ops.tdbn(current_TNCHW, weight, bias, mean.clone(), var.clone(), **options).expand(out.shape)
        if (add_before := kwargs.get("add_before")) is not None:
            y_TNCHW = y_TNCHW + add_before
        if torch.isnan(y_TNCHW).any():
            raise FloatingPointError(f"the input of {self._name}'s neurons is NaN; the network has diverged")
        self._observation.add(self._name, y_TNCHW, layer.neuron)


class _Counts:
    """One layer's counts."""

    def __init__(self, y_TNCHW: Tensor, neuron: MLF, every: int):
        self._neuron, self._every, self._shape = neuron, every, y_TNCHW.shape[2:]
        self.samples, self._dormant = 0, 0
        self._bins = round((max(4.0, neuron.thresholds[-1] + 1.4) - LOW) / BIN)
        levels, like = len(neuron.thresholds), {"dtype": torch.int64, "device": y_TNCHW.device}
        self._fired_KT = torch.zeros(levels, len(y_TNCHW), **like)
        self._places_KB = torch.zeros(levels, 1 + self._bins + 1, **like)

    def add(self, y_TNCHW: Tensor) -> None:
        self.samples += y_TNCHW.shape[1]
        y_TNM = y_TNCHW.permute(0, 1, 3, 4, 2).flatten(2)  # channels last, as in memory
        at_once = max(1, AT_ONCE // y_TNM.shape[2]) if y_TNM.device.type == "cpu" else y_TNM.shape[1]
        for part_TNM in y_TNM.split(at_once, dim=1):
            self._follow(part_TNM.flatten(1))

    def _follow(self, y_TM: Tensor) -> None:
        """u_k[t] = decay · u_k[t-1] · (1 - s_k[t-1]) + y[t]; see `multifire.ops.reference.mlf`."""
        neuron = self._neuron
        nearest_M = torch.full_like(y_TM[0], torch.inf)  # to a threshold, over levels and time steps
        for k, threshold in enumerate(neuron.thresholds):
            u_M = torch.zeros_like(y_TM[0])
            for t, y_M in enumerate(y_TM):
                u_M.mul_(neuron.decay).add_(y_M)
                self._place(k, u_M[:: self._every])
                above_M = u_M - threshold
                fired_M = above_M > 0
                self._fired_KT[k, t] += fired_M.count_nonzero()
                torch.minimum(nearest_M, above_M.abs_(), out=nearest_M)
                u_M.masked_fill_(fired_M, 0)
        # Surrogate derivatives fall with the distance from the threshold, so the nearest membrane decides.
        derivative_M = SURROGATES[neuron.surrogate](nearest_M, neuron.width)
        self._dormant += len(derivative_M) - int(derivative_M.count_nonzero())

    def _place(self, k: int, u_M: Tensor) -> None:
        places_M = (u_M - LOW).div_(BIN).add_(1).clamp_(0, self._bins + 1)  # 0 is below, the last one above
        self._places_KB[k] += places_M.long().bincount(minlength=self._bins + 2)

    def result(self, name: str) -> LayerActivity:
        channels, height, width = self._shape
        units = self.samples * self._shape.numel()
        places_KB = self._places_KB.cpu().numpy()
        return LayerActivity(
            name=name,
            shape=(channels, height, width),
            dormant=self._dormant / units,
            rate=self._fired_KT.cpu().numpy() / units,
            membranes=Membranes(
                low=LOW,
                high=LOW + self._bins * BIN,
                counts=places_KB[:, 1:-1],
                below=places_KB[:, 0],
                above=places_KB[:, -1],
            ),
        )
