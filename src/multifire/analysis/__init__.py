"""Measure a network: dormant units, firing rates, gradient norms, energy.

`analyze` runs all measures on a few batches and gives one record of plain values. Training writes a record every
`--analyze-every` epochs as a line of `analysis.jsonl` in the run's folder; at the run's end `analysis.json` holds the
record of the model that the summary's accuracy is of, on test samples. Shares are between 0 and 1; lists are nested as
their brackets say, the outermost first; K levels, T time steps, B bins.

    {"epoch": int,                     from 0; only in analysis.jsonl
     "split": "test" | "validation",   whose samples were analysed; in both files
     "checkpoint": "last" | "best by validation",     only in analysis.json
     "seconds": float,                 duration of the analysis
     "samples": int,                   on which layers, gradient and energy are measured
     "timesteps": int,
     "neuron": {"thresholds": [K], "decay": float, "surrogate": str, "width": float,
                "windows": [[from, to] × K]},    where the surrogate derivative is not 0; null: everywhere
     "dormant": float,                 share over all layers
     "layers": [                       layers of neurons, as they are computed; a DS block's firing shortcut is one
        {"name": str, "shape": [C, H, W],
         "dormant": float,
         "rate": [[T] × K],            share of (sample, neuron) that fire, for each level and time step
         "membrane": {"low": float, "high": float,          B equal bins between them; of every 7th neuron
                      "counts": [[B] × K], "below": [K], "above": [K]},
         "weight_grad_norm": float,    of the convolution's weights
         "activation_grad_norm": float}],   with respect to the layer's output
     "gradient": {"loss": float,       of the same samples in training mode
                  "weight_ratio": float | null, "activation_ratio": float | null,   last layer's norm over the first's
                  "voting_grad_norm": float},
     "per_step": {"samples": int, "accuracy": [T], "loss": [T]},   of the mean logits of the first t steps
     "confusion": [[classes] × classes],    samples; rows are true classes, columns predicted ones
     "energy": {"ac_pj": float, "mac_pj": float,            prices of an accumulate and of a multiply-accumulate
                "macs": float, "synops": float,             of an inference of the spiking network
                "snn_pj": float,
                "ann_macs": int, "ann_pj": float,           the same network without time, every product a MAC
                "quantised_bits": int, "quantised_pj": float,    with K+1 levels of activation
                "connections": [{"name": str, "kind": "conv" | "linear" | "identity", "shape": [C, H, W] | [classes],
                                 "ann_macs": int, "macs": float, "synops": float}]}}

Training writes `per_step` and `confusion` of the whole split, which it scores anyway. A gradient or a loss that is not
finite is null.
"""

from multifire.analysis.activity import Activity, LayerActivity, Membranes, measure_activity
from multifire.analysis.energy import Connection, Energy, measure_energy
from multifire.analysis.gradients import Gradients, mean_cross_entropy, measure_gradients
from multifire.analysis.record import Analysis, analyze

__all__ = [
    "Activity",
    "Analysis",
    "Connection",
    "Energy",
    "Gradients",
    "LayerActivity",
    "Membranes",
    "analyze",
    "mean_cross_entropy",
    "measure_activity",
    "measure_energy",
    "measure_gradients",
]
