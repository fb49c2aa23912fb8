"""Make all measurements of a network and return them as one JSON object."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from multifire.analysis.activity import Activity, record_activity
from multifire.analysis.energy import AC_PJ, MAC_PJ, Energy, count_operations
from multifire.analysis.evaluate import Evaluation, evaluate
from multifire.analysis.gradients import Gradients, Loss, mean_cross_entropy, measure_gradients
from multifire.analysis.probe import preserve_state, require_samples
from multifire.nn import MLF, SpikingNetwork

EVERY = 7
"""Every 7th neuron enters the histograms: a prime number, so that all channels are covered."""


@dataclass(frozen=True)
class Analysis:
    """Result of `analyze`."""

    activity: Activity
    gradients: Gradients
    energy: Energy
    scored: Evaluation
    neuron: MLF
    seconds: float

    def record(self) -> dict[str, Any]:
        """Return the record in the layout of `multifire.analysis`, without "epoch", "split" and "checkpoint"."""
        activity, gradients, scored = self.activity, self.gradients, self.scored
        norms = {
            name: (weights, activations)
            for name, weights, activations in zip(
                gradients.names, gradients.weights, gradients.activations, strict=True
            )
        }
        layers = [
            {
                "name": layer.name,
                "shape": list(layer.shape),
                "thresholds": list(layer.thresholds),
                "decay": layer.decay,
                "dormant": layer.dormant,
                "rate": layer.rate.tolist(),
                "membrane": {
                    "low": layer.membranes.low,
                    "high": layer.membranes.high,
                    "counts": layer.membranes.counts.tolist(),
                    "below": layer.membranes.below.tolist(),
                    "above": layer.membranes.above.tolist(),
                },
                "weight_grad_norm": _finite(norms[layer.name][0]),
                "activation_grad_norm": _finite(norms[layer.name][1]),
            }
            for layer in activity.layers
        ]
        return {
            "seconds": self.seconds,
            "samples": activity.samples,
            "timesteps": len(scored.per_step),
            "neuron": {
                "thresholds": list(self.neuron.thresholds),
                "decay": self.neuron.decay,
                "membranes": self.neuron.membranes,
                "reset": self.neuron.reset,
                "signed": self.neuron.signed,
                "surrogate": self.neuron.surrogate,
                "width": self.neuron.width,
                "windows": windows(self.neuron),
            },
            "dormant": activity.dormant,
            "layers": layers,
            "gradient": {
                "loss": _finite(gradients.loss),
                "weight_ratio": _finite(gradients.weight_ratio),
                "activation_ratio": _finite(gradients.activation_ratio),
                "voting_grad_norm": _finite(gradients.voting),
            },
            "per_step": {
                "samples": scored.count,
                "accuracy": scored.per_step,
                "loss": [_finite(loss) for loss in scored.loss_per_step],
            },
            "confusion": scored.confusion,
            "energy": _energy_record(self.energy),
        }


def analyze(
    model: SpikingNetwork,
    batches: Sequence[tuple[Tensor, Tensor]],
    *,
    loss: Loss = mean_cross_entropy,
    precision: str = "fp32",
    scored: Evaluation | None = None,
    ac_pj: float = AC_PJ,
    mac_pj: float = MAC_PJ,
) -> Analysis:
    """Measure a model on a few batches: activity, energy and scores in evaluation mode, then gradients.

    It takes two forward passes and one backward pass, and does not change the model.

    Args:
        model: the network.
        batches: x [T, N, C, H, W] and labels y [N].
        loss: returns the loss summed over samples, whose gradient is measured.
        precision: "bf16" runs convolutions under autocast.
        scored: scores of the model on more samples (default: its scores on `batches`).
        ac_pj: energy of an accumulate in picojoules.
        mac_pj: energy of a multiply-accumulate in picojoules.

    Raises:
        ValueError: there is no sample, or a price that is not above 0.
        FloatingPointError: a membrane is NaN.
    """
    start = time.monotonic()
    batches = list(batches)
    require_samples(sum(len(y) for _, y in batches))
    with (
        preserve_state(model),
        record_activity(model, EVERY) as recorder,
        count_operations(model, ac_pj, mac_pj) as counter,
    ):
        own_scores = evaluate(model, batches, precision)
    gradients = measure_gradients(model, batches, loss=loss, precision=precision)
    return Analysis(
        activity=recorder.result(),
        gradients=gradients,
        energy=counter.result(),
        scored=scored or own_scores,
        neuron=model.stem.neuron,
        seconds=time.monotonic() - start,
    )


def windows(neuron: MLF) -> list[list[float]] | None:
    """Return the range in which each level's surrogate derivative is not 0; None if it is 0 nowhere, or not known.

    Signed levels have another range, its mirror image.
    """
    reach = {"rect": neuron.width / 2, "triangle": neuron.width}.get(neuron.surrogate)
    if reach is None:
        return None
    return [[threshold - reach, threshold + reach] for threshold in neuron.thresholds]


def _energy_record(energy: Energy) -> dict[str, Any]:
    return {
        "ac_pj": energy.ac_pj,
        "mac_pj": energy.mac_pj,
        "macs": energy.macs,
        "synops": energy.synops,
        "snn_pj": energy.snn_pj,
        "ann_macs": energy.ann_macs,
        "ann_pj": energy.ann_pj,
        "quantised_bits": energy.bits,
        "quantised_pj": energy.quantised_pj,
        "connections": [
            {
                "name": each.name,
                "kind": each.kind,
                "shape": list(each.shape),
                "ann_macs": each.ann_macs,
                "macs": each.macs,
                "synops": each.synops,
            }
            for each in energy.connections
        ],
    }


def _finite(value: float) -> float | None:
    """Return None for NaN and infinity, which JSON lacks."""
    return float(value) if math.isfinite(value) else None
