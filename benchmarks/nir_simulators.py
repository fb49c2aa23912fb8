"""Check that a NIR file that multifire exported gives the same spikes in other simulators.

    python -m benchmarks.nir_simulators NETWORK.nir FRAMES.npy --out results.csv

FRAMES.npy holds frames [T, N, C, H, W]. The environment needs multifire, nir, norse, snntorch, sinabs and spikingjelly.
Each simulator is tested in two ways:

- *importer*: the simulator's own NIR importer reads the whole graph. If it fails, its error message is recorded.
- *node by node*: this program computes the nodes in topological order. The input of a node is the sum over its incoming
  edges. Each LIF node is computed by the simulator's neuron with the parameters of the node. Convolutions, pooling and
  the voting layer are computed by torch, which all these simulators use for them. sinabs is not tested in this way.

The spikes of each MLF layer (the sum over its K LIF nodes) are compared with those of multifire at every time step.

Shapes: T time steps, N samples, C channels, H rows, W columns.
"""

# pyright: reportMissingImports=false
import argparse
import csv
import importlib.metadata
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import nir
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from multifire.export.fold import FoldedFire
from multifire.export.nir import from_nir

Neuron = Callable[[Tensor], Tensor]
"""A LIF neuron of a simulator: takes the current of one time step, returns the spikes, keeps the membrane potential."""


def norse_neuron(node: nir.LIF, dtype: torch.dtype) -> Neuron:
    """Return the cell that Norse's importer uses. The importer ignores R, so the current is multiplied by R here."""
    from norse.torch.functional.lif_box import LIFBoxParameters
    from norse.torch.module.lif_box import LIFBoxCell

    names = ("tau", "r", "v_leak", "v_threshold", "v_reset")
    tensors = {name: torch.from_numpy(getattr(node, name)).to(dtype) for name in names}
    parameters = LIFBoxParameters(
        tau_mem_inv=1 / tensors["tau"],
        v_leak=tensors["v_leak"],
        v_th=tensors["v_threshold"],
        v_reset=tensors["v_reset"],
    )
    cell, state = LIFBoxCell(parameters, dt=1.0), None

    def step(current: Tensor) -> Tensor:
        nonlocal state
        spikes, state = cell(tensors["r"] * current, state)
        return spikes

    return step


def snntorch_neuron(node: nir.LIF, dtype: torch.dtype) -> Neuron:
    """Return `Leaky` with reset to zero: mem = beta·mem·(1 - spike) + x, beta = 1 - 1/τ. It assumes R = τ."""
    import snntorch

    beta, threshold = (torch.from_numpy(a).to(dtype) for a in (1 - 1 / node.tau, node.v_threshold))
    cell = snntorch.Leaky(beta=beta, threshold=threshold, reset_mechanism="zero")
    membrane = None

    def step(current: Tensor) -> Tensor:
        nonlocal membrane
        membrane = torch.zeros_like(current) if membrane is None else membrane
        spikes, membrane = cell(current, membrane)
        return spikes

    return step


def spikingjelly_neuron(node: nir.LIF, dtype: torch.dtype) -> Neuron:
    """Return `LIFNode` with decay_input=False: v = v - v/τ + x. It assumes R = τ.

    It fires if v ≥ threshold, whereas NIR's LIF fires only if v > threshold.
    """
    from spikingjelly.activation_based import neuron

    return neuron.LIFNode(
        tau=float(node.tau.flat[0]), decay_input=False, v_threshold=float(node.v_threshold.flat[0]), v_reset=0.0
    )


NEURONS = {"norse": norse_neuron, "snntorch": snntorch_neuron, "spikingjelly": spikingjelly_neuron}


def import_norse(graph: nir.NIRGraph, batch: int) -> torch.nn.Module:
    import norse.torch

    return norse.torch.from_nir(graph, dt=1.0)


def import_snntorch(graph: nir.NIRGraph, batch: int) -> torch.nn.Module:
    from snntorch.import_nir import import_from_nir

    return import_from_nir(graph)


def import_sinabs(graph: nir.NIRGraph, batch: int) -> torch.nn.Module:
    from sinabs.nir import from_nir as import_from_nir

    return import_from_nir(graph, batch_size=batch)


def import_spikingjelly(graph: nir.NIRGraph, batch: int) -> torch.nn.Module:
    from spikingjelly.activation_based.nir_exchange import import_from_nir

    return import_from_nir(graph, dt=1.0)


IMPORTERS = {
    "norse": import_norse, "snntorch": import_snntorch, "sinabs": import_sinabs, "spikingjelly": import_spikingjelly
}  # fmt: skip


@torch.no_grad()
def run_multifire(path: Path, x_TNCHW: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """Run the network with multifire in the precision of x.

    Returns:
        The spikes [T, N, C, H, W] of each layer by its name in the graph, and the logits [N, L], mean over time.
    """
    model, spikes = from_nir(path).to(x_TNCHW.dtype), {}
    for name, module in model.named_modules():
        if isinstance(module, FoldedFire):

            def save_spikes(_module, _inputs, options, out, name=name):
                residual = options.get("add_after")
                spikes[name.replace(".", "_") + "_neuron"] = out - (0 if residual is None else residual)

            module.register_forward_hook(save_spikes, with_kwargs=True)
    return spikes, model(x_TNCHW)


@torch.no_grad()
def run_node_by_node(
    graph: nir.NIRGraph, make_neuron: Callable[[nir.LIF, torch.dtype], Neuron], x_TNCHW: Tensor
) -> tuple[dict[str, Tensor], Tensor]:
    """Run the graph node by node; `make_neuron` makes the simulator's neuron for each LIF node.

    Returns:
        The same as `run_multifire`.
    """
    sources = defaultdict(list)
    for source, target in graph.edges:
        sources[target].append(source)
    order, remaining = [], dict(graph.nodes)
    while remaining:
        ready = [name for name in remaining if not any(source in remaining for source in sources[name])]
        order += ready
        remaining = {name: node for name, node in remaining.items() if name not in ready}
    dtype = x_TNCHW.dtype
    neurons = {name: make_neuron(node, dtype) for name, node in graph.nodes.items() if isinstance(node, nir.LIF)}
    layers, logits = defaultdict(list), []
    for frame in x_TNCHW:
        values: dict[str, Tensor] = {}
        for name in order:
            node = graph.nodes[name]
            x = frame if isinstance(node, nir.Input) else torch.stack([values[s] for s in sources[name]]).sum(0)
            # A simulator may return spikes in another dtype; 0 and 1 are exact in every dtype.
            values[name] = neurons[name](x).to(dtype) if name in neurons else compute_stateless(node, x, dtype)
        spikes_of_levels = defaultdict(list)
        for name in neurons:
            spikes_of_levels[name.rpartition("_level")[0]].append(values[name])
        for layer, levels in spikes_of_levels.items():
            layers[layer].append(sum(levels))
        logits.append(values["output"])
    return {layer: torch.stack(steps) for layer, steps in layers.items()}, torch.stack(logits).mean(0)


def compute_stateless(node: nir.NIRNode, x: Tensor, dtype: torch.dtype) -> Tensor:
    """Compute a node without state by torch; nodes of other types, such as Input and Output, return x unchanged."""
    if isinstance(node, nir.Conv2d):
        assert isinstance(node.stride, tuple | np.ndarray)
        assert isinstance(node.padding, tuple | np.ndarray)
        weight, bias = (torch.from_numpy(a).to(dtype) for a in (node.weight, node.bias))
        return F.conv2d(x, weight, bias, tuple(map(int, node.stride)), tuple(map(int, node.padding)))
    if isinstance(node, nir.AvgPool2d):
        return F.avg_pool2d(x, tuple(map(int, node.kernel_size)), tuple(map(int, node.stride)))
    if isinstance(node, nir.Flatten):
        return x.flatten(1)
    if isinstance(node, nir.Affine):
        return F.linear(x, *(torch.from_numpy(a).to(dtype) for a in (node.weight, node.bias)))
    return x


def try_importer(name: str, path: Path, x_TNCHW: Tensor, expected: Tensor) -> str:
    """Run the graph that the simulator's importer reads.

    Returns:
        The percentage of predictions that equal those of the logits `expected`, or the error message.
    """
    try:
        network = IMPORTERS[name](nir.read(path), x_TNCHW.shape[1])
        state, logits = None, torch.zeros(1)
        for frame in x_TNCHW.float():
            out = network(frame, state) if name in ("norse", "snntorch") else network(frame)
            out, state = out if isinstance(out, tuple) else (out, None)
            logits = logits + out
        same = (logits.argmax(1) == expected.argmax(1)).float().mean().item()
        return f"read; {100 * same:.1f} % of predictions are the same"
    except ImportError as error:
        return f"missing: {error}"
    except Exception as error:  # every error of the simulator is a result
        return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("network", type=Path, help="NIR file")
    parser.add_argument("frames", type=Path, help="NumPy file with frames [T, N, C, H, W]")
    parser.add_argument("--out", type=Path, required=True, help="CSV file to write")
    args = parser.parse_args()
    x = torch.from_numpy(np.load(args.frames, allow_pickle=False))
    rows = []
    for dtype in (torch.float64, torch.float32):
        spikes, logits = run_multifire(args.network, x.to(dtype))
        for name in IMPORTERS:
            version = importlib.metadata.version(name)
            row = {"simulator": name, "version": version, "precision": str(dtype)[6:], "samples": x.shape[1]}
            if name in NEURONS:
                graph = nir.read(args.network)
                found_spikes, found_logits = run_node_by_node(graph, NEURONS[name], x.to(dtype))
                same_predictions = (found_logits.argmax(1) == logits.argmax(1)).double().mean().item()
                same_spikes = {
                    layer: (found_spikes[layer] == expected).double().mean().item()
                    for layer, expected in spikes.items()
                }
                worst_layer = min(same_spikes, key=same_spikes.__getitem__)
                row |= {
                    "same spikes, worst layer %": f"{100 * same_spikes[worst_layer]:.4f}",
                    "worst layer": worst_layer,
                    "same predictions %": f"{100 * same_predictions:.2f}",
                }
            if dtype == torch.float32:
                row["its own importer"] = try_importer(name, args.network, x, logits)
            rows.append(row)
            print(row, flush=True)
    with args.out.open("w", newline="") as file:
        columns = list(dict.fromkeys(name for row in rows for name in row))
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
