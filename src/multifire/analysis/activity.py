"""Measure dormant units, firing rates and membrane potentials of each layer.

Shapes: T time steps, K levels, N samples, C channels, H height, W width, B bins, M neurons of one or several samples.
"""

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from multifire import ops
from multifire.analysis.probe import LabelledBatches, layers_of_neurons, preserve_state, run_batches
from multifire.config.neurons import SURROGATES as BUILT_IN_SURROGATES
from multifire.nn import MLF, ConvFire
from multifire.ops.surrogates import derivative

BIN_WIDTH = 0.1
"""Width of a histogram bin. With the paper's thresholds, the surrogate windows begin and end at bin edges."""
HISTOGRAM_LOW = -2.0
"""Lower edge of the first bin."""
CHUNK_NEURONS = 2**15
"""Number of neurons that a CPU simulates together; their membranes fit in its cache."""


@dataclass(frozen=True)
class Membranes:
    """Histogram of membrane potentials over samples, neurons and time steps, with B equal bins from `low` to `high`."""

    low: float
    high: float
    counts: np.ndarray
    """[K, B]: values in each bin."""
    below: np.ndarray
    """[K]: values below `low`."""
    above: np.ndarray
    """[K]: values above `high`."""


@dataclass(frozen=True)
class LayerActivity:
    """Activity of one layer of neurons."""

    name: str
    shape: tuple[int, int, int]
    """C, H, W of the layer's neurons."""
    thresholds: tuple[float, ...]
    """θ, the learned ones if they are learned."""
    decay: float
    dormant: float
    """Fraction of (sample, neuron) pairs whose surrogate derivative is 0 at every level and time step."""
    rate: np.ndarray
    """[K, T]: fraction of (sample, neuron) pairs that fire, in either direction."""
    membranes: Membranes

    @property
    def neurons(self) -> int:
        """Number of neurons: C·H·W."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Activity:
    """Activity of all layers of neurons."""

    samples: int
    """Number of samples on which the activity is measured."""
    layers: list[LayerActivity]
    """The layers in order of computation."""

    @property
    def dormant(self) -> float:
        """Fraction of dormant units over the neurons of all layers."""
        neurons = sum(layer.neurons for layer in self.layers)
        return sum(layer.dormant * layer.neurons for layer in self.layers) / neurons


def measure_activity(
    model: nn.Module, batches: LabelledBatches, *, precision: str = "fp32", every: int = 1
) -> Activity:
    """Measure dormant units, firing rates and membrane potentials of every layer of neurons.

        dormant:  ∂s_k/∂u_k = 0 at every level k and every time step t

    The model keeps its mode. In training mode norms use the statistics of each batch; running statistics do not
    change. No backend stores membranes, so they are computed again from the input of each layer. If a membrane is
    within rounding error of its threshold, it may count as fired although the neuron did not fire.

    Args:
        model: a network with layers of multifire's neurons.
        batches: x [T, N, C, H, W], all with the same T, and labels y [N]; the labels are not used.
        precision: "bf16" runs convolutions under autocast.
        every: only every `every`-th neuron enters the histograms, which take most of the time.

    Raises:
        ValueError: there is no sample.
        FloatingPointError: a membrane is NaN.

    Source: Feng et al., IJCAI 2022 (definition of a dormant unit).
    """
    with preserve_state(model), record_activity(model, every) as recorder:
        run_batches(model, batches, precision)
    return recorder.result()


@contextlib.contextmanager
def record_activity(model: nn.Module, every: int) -> Iterator["ActivityRecorder"]:
    """Record the activity of every layer of neurons while the model runs inside the context."""
    recorder = ActivityRecorder(every)
    with contextlib.ExitStack() as stack:
        for name, layer in layers_of_neurons(model).items():
            hooks = _LayerHooks(name, recorder)
            if isinstance(layer, ConvFire):
                stack.enter_context(layer.conv.register_forward_hook(hooks.after_conv))
                stack.enter_context(layer.register_forward_hook(hooks.after_layer, with_kwargs=True))
            else:
                stack.enter_context(layer.register_forward_hook(hooks.after_neurons))
        yield recorder


class ActivityRecorder:
    """Collect the counts of all layers."""

    def __init__(self, every: int):
        self._every = every
        self._layers: dict[str, _LayerCounts] = {}

    def add(self, name: str, y_TNCHW: Tensor, neuron: MLF) -> None:
        """Add a batch, given the input current y of the layer's neurons."""
        if name not in self._layers:
            self._layers[name] = _LayerCounts(y_TNCHW, neuron, self._every)
        self._layers[name].add(y_TNCHW)

    def result(self) -> Activity:
        """Return the activity of all batches.

        Raises:
            ValueError: no layer has fired: there are no batches, or the network has no neurons of multifire.
        """
        if not self._layers:
            raise ValueError(
                "no activity was recorded, expected a network with layers of multifire and a batch or more"
            )
        layers = [counts.result(name) for name, counts in self._layers.items()]
        return Activity(next(iter(self._layers.values())).samples, layers)


class _LayerHooks:
    """Forward hooks that compute the input current of a layer's neurons: tdBN(convolution) + shortcut."""

    def __init__(self, name: str, recorder: ActivityRecorder):
        self._name, self._recorder = name, recorder
        self._conv_out: Tensor | None = None

    def after_conv(self, _conv: nn.Module, _inputs: tuple, out: Tensor) -> None:
        self._conv_out = out.detach()

    @torch.no_grad()
    def after_layer(self, layer: ConvFire, inputs: tuple[Tensor], kwargs: dict[str, Any], out: Tensor) -> None:
        assert self._conv_out is not None
        conv_TNCHW = self._conv_out.unflatten(0, (-1, out.shape[1]))  # T is 1 for a static image
        self._conv_out = None
        weight, bias, mean, var = layer.norm.tensors()
        options = {**layer.norm.options(), "backend": layer.neuron.backend}
        y_TNCHW = ops.tdbn(conv_TNCHW, weight, bias, mean.clone(), var.clone(), **options).expand(out.shape)
        if (add_before := kwargs.get("add_before")) is not None:
            y_TNCHW = y_TNCHW + add_before
        self._add(y_TNCHW, layer.neuron)

    @torch.no_grad()
    def after_neurons(self, neuron: MLF, inputs: tuple[Tensor], _out: Tensor) -> None:
        self._add(inputs[0], neuron)

    def _add(self, y_TNCHW: Tensor, neuron: MLF) -> None:
        if torch.isnan(y_TNCHW).any():
            raise FloatingPointError(f"the input of {self._name}'s neurons is NaN; the network has diverged")
        self._recorder.add(self._name, y_TNCHW, neuron)


class _LayerCounts:
    """Counts of dormant units, spikes and membrane potentials in one layer."""

    def __init__(self, y_TNCHW: Tensor, neuron: MLF, every: int):
        self._neuron, self._every, self._shape = neuron, every, y_TNCHW.shape[2:]
        self._thresholds, self._decay = neuron.thresholds, neuron.decay
        self.samples, self._dormant = 0, 0
        self._bins = round((max(4.0, self._thresholds[-1] + 1.4) - HISTOGRAM_LOW) / BIN_WIDTH)
        levels, like = neuron.levels, {"dtype": torch.int64, "device": y_TNCHW.device}
        self._fired_KT = torch.zeros(levels, len(y_TNCHW), **like)
        self._histogram_KB = torch.zeros(levels, 1 + self._bins + 1, **like)  # bin 0: below; last bin: above

    def add(self, y_TNCHW: Tensor) -> None:
        self.samples += y_TNCHW.shape[1]
        y_TNM = y_TNCHW.permute(0, 1, 3, 4, 2).flatten(2)  # channels last, as in memory
        chunk = max(1, CHUNK_NEURONS // y_TNM.shape[2]) if y_TNM.device.type == "cpu" else y_TNM.shape[1]
        for part_TNM in y_TNM.split(chunk, dim=1):
            self._simulate(part_TNM.flatten(1))

    def _simulate(self, y_TM: Tensor) -> None:
        """Run the neurons as `multifire.ops.reference.mlf` does, one membrane after the other."""
        levels, derivatives = range(self._neuron.levels), _Derivatives(self._neuron, y_TM[0])
        for levels_of_membrane in [levels] if self._neuron.membranes == "shared" else [[k] for k in levels]:
            u_M = torch.zeros_like(y_TM[0])
            for t, y_M in enumerate(y_TM):
                u_M.mul_(self._decay).add_(y_M)
                fired = [self._fire(k, t, u_M, derivatives) for k in levels_of_membrane]
                self._reset(u_M, levels_of_membrane, fired)
        self._dormant += derivatives.dormant()

    def _fire(self, k: int, t: int, u_M: Tensor, derivatives: "_Derivatives") -> list[Tensor]:
        """Count a level's spikes; return the masks of its spikes 1 and, if it is signed, of its spikes -1."""
        self._add_to_histogram(k, u_M[:: self._every])
        fired = []
        for sign in (1, -1) if self._neuron.signed else (1,):
            v_M = (u_M if sign > 0 else -u_M) - self._thresholds[k]
            fired.append(v_M > 0)
            self._fired_KT[k, t] += fired[-1].count_nonzero()
            derivatives.add(v_M)
        return fired

    def _reset(self, u_M: Tensor, levels: Sequence[int], fired: list[list[Tensor]]) -> None:
        """Reset the membrane of these levels in place."""
        if self._neuron.reset != "subtract":  # if any level fires, the first does
            for mask_M in fired[0]:
                u_M.masked_fill_(mask_M, 0)
            return
        cost_M = torch.zeros_like(u_M)
        for k, masks in zip(levels, fired, strict=True):
            price = 1.0 if self._neuron.membranes == "shared" else self._thresholds[k]
            for sign, mask_M in zip((1, -1), masks, strict=False):
                cost_M.add_(mask_M, alpha=sign * price)
        u_M.sub_(cost_M)

    def _add_to_histogram(self, k: int, u_M: Tensor) -> None:
        bin_M = (u_M - HISTOGRAM_LOW).div_(BIN_WIDTH).add_(1).clamp_(0, self._bins + 1)
        self._histogram_KB[k] += bin_M.long().bincount(minlength=self._bins + 2)

    def result(self, name: str) -> LayerActivity:
        channels, height, width = self._shape
        units = self.samples * self._shape.numel()
        histogram_KB = self._histogram_KB.cpu().numpy()
        return LayerActivity(
            name=name,
            shape=(channels, height, width),
            thresholds=self._thresholds,
            decay=self._decay,
            dormant=self._dormant / units,
            rate=self._fired_KT.cpu().numpy() / units,
            membranes=Membranes(
                low=HISTOGRAM_LOW,
                high=HISTOGRAM_LOW + self._bins * BIN_WIDTH,
                counts=histogram_KB[:, 1:-1],
                below=histogram_KB[:, 0],
                above=histogram_KB[:, -1],
            ),
        )


class _Derivatives:
    """Find the neurons whose surrogate derivative is 0 wherever it is added."""

    def __init__(self, neuron: MLF, like_M: Tensor):
        self._name, self._width = neuron.surrogate, neuron.width
        self._decreases = neuron.surrogate in BUILT_IN_SURROGATES
        self._distance_M = torch.full_like(like_M, torch.inf)
        self._active_M = torch.zeros_like(like_M, dtype=torch.bool)

    def add(self, v_M: Tensor) -> None:
        """Add potentials above a threshold; changes them."""
        if self._decreases:
            torch.minimum(self._distance_M, v_M.abs_(), out=self._distance_M)
        else:
            self._active_M |= derivative(self._name, v_M, self._width) != 0

    def dormant(self) -> int:
        """Return the number of neurons without a derivative."""
        # Built-in derivatives do not increase with the distance from the threshold. If one is 0 at the smallest
        # distance, it is 0 everywhere.
        active_M = derivative(self._name, self._distance_M, self._width) != 0 if self._decreases else self._active_M
        return len(active_M) - int(active_M.count_nonzero())
