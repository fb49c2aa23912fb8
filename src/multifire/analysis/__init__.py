"""Measure a network: dormant units, firing rates, membrane potentials, gradient norms, operations, energy and scores.

`analyze` makes all measurements on a few batches. `Analysis.record()` returns them as one JSON object, which this text
defines. Training writes two files to the run folder:

- analysis.jsonl: one line with a record every `--analyze-every` epochs;
- analysis.json: the record of the finished network on test samples. It describes the checkpoint whose accuracy
  summary.json reports.

Fractions are between 0 and 1. Lists are nested as the brackets show, the outermost dimension first. K levels, T time
steps, B bins.

    {"epoch": int,                     counted from 0; only in analysis.jsonl
     "split": "test" | "validation",   the split of the analysed samples; in both files
     "checkpoint": "last" | "best by validation",     only in analysis.json
     "seconds": float,                 duration of the analysis
     "samples": int,                   number of samples for layers, gradient and energy
     "timesteps": int,
     "neuron": {"thresholds": [K], "decay": float,        those of the first layer; learned ones may differ by layer
                "membranes": "own" | "shared", "reset": "zero" | "subtract" | "any", "signed": bool,
                "surrogate": str, "width": float,
                "windows": [[from, to] × K]},    range of u in which the surrogate derivative is not 0, for signed
                                                 levels also its mirror image; null: everywhere, or not known
     "dormant": float,                 fraction of dormant units in all layers
     "layers": [                       layers of neurons in order of computation, including MLF shortcuts of DS blocks
        {"name": str, "shape": [C, H, W],
         "thresholds": [K], "decay": float,
         "dormant": float,
         "rate": [[T] × K],            fraction of (sample, neuron) pairs that fire, in either direction
         "membrane": {"low": float, "high": float,          B equal bins from low to high; every 7th neuron is counted
                      "counts": [[B] × K], "below": [K], "above": [K]},
         "weight_grad_norm": float,    for the weights of the layer's convolution; null for neurons without one
         "activation_grad_norm": float}],   for the layer's output
     "gradient": {"loss": float,       loss of the same samples in training mode
                  "weight_ratio": float | null, "activation_ratio": float | null,   norm of the last layer / first layer
                  "voting_grad_norm": float},
     "per_step": {"samples": int, "accuracy": [T], "loss": [T]},   for the mean logits of the first t steps
     "confusion": [[classes] × classes],    numbers of samples; rows: true class, columns: predicted class
     "energy": {"ac_pj": float, "mac_pj": float,            energy of one accumulate and of one multiply-accumulate
                "macs": float, "synops": float,             operations of one inference of the spiking network
                "snn_pj": float,
                "ann_macs": int, "ann_pj": float,           the same network as an ANN: one pass, every product a MAC
                "quantised_bits": int, "quantised_pj": float,    the same as an ANN with K+1 activation levels
                "connections": [{"name": str, "kind": "conv" | "linear" | "identity", "shape": [C, H, W] | [classes],
                                 "ann_macs": int, "macs": float, "synops": float}]}}

In the records that training writes, `per_step` and `confusion` cover the whole split, because training scores it
anyway. A gradient norm or a loss that is not finite is null.
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
