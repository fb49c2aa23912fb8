"""Does a NIR file of ours mean the same in simulators that we did not write?

    python -m benchmarks.nir_simulators NETWORK.nir FRAMES.npy --out results.csv

Runs in an environment with multifire, nir, norse, snntorch, sinabs and spikingjelly; a simulator that is not there is
said to be missing. FRAMES holds [T, N, C, H, W]. Each simulator is tried in two ways:

- *importer*: its own reader of NIR is given the whole graph; where it refuses, its message is kept;
- *node by node*: the graph is walked in topological order, sums where edges join, and every LIF node is the simulator's
  own neuron, with the node's own parameters. Convolutions, pooling and the voting layer are torch's, as in all of them.

Spikes are compared per MLF layer (the sum of its K LIF nodes) at every time step, with those of multifire.
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
"""A LIF of one simulator: the current of a time step in, its spikes out; it keeps its own membrane."""


def norse_neuron(node: nir.LIF, dtype: torch.dtype) -> Neuron:
    """Its importer's own cell; the importer leaves R out, so the current is multiplied by it here."""
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
    """`Leaky` with reset to zero: mem = beta·mem·(1 - spike) + x, beta = 1 - 1/τ, which takes R = τ for granted."""
    import snntorch

    beta, threshold = (torch.from_numpy(a).to(dtype) for a in (1 - 1 / node.tau, node.v_threshold))
    cell = snntorch.Leaky(beta=beta, threshold=threshold, reset_mechanism="zero")
    memory = None

    def step(current: Tensor) -> Tensor:
        nonlocal memory
        memory = torch.zeros_like(current) if memory is None else memory
        spikes, memory = cell(current, memory)
        return spikes

    return step


def spikingjelly_neuron(node: nir.LIF, dtype: torch.dtype) -> Neuron:
    """`LIFNode` whose input does not decay: v = v - v/τ + x, R = τ; it fires at v >= threshold, NIR above it."""
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
    from sinabs.nir import from_nir as read

    return read(graph, batch_size=batch)


def import_spikingjelly(graph: nir.NIRGraph, batch: int) -> torch.nn.Module:
    from spikingjelly.activation_based.nir_exchange import import_from_nir

    return import_from_nir(graph, dt=1.0)


IMPORTERS = {
    "norse": import_norse, "snntorch": import_snntorch, "sinabs": import_sinabs, "spikingjelly": import_spikingjelly
}  # fmt: skip


@torch.no_grad()
def ours(path: Path, x_TNCHW: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """Spikes [T, N, C, H, W] of each layer, and mean logits, in x's precision."""
    model, spikes = from_nir(path).to(x_TNCHW.dtype), {}
    for name, module in model.named_modules():
        if isinstance(module, FoldedFire):

            def keep(_module, _inputs, options, out, name=name):
                after = options.get("add_after")
                spikes[name.replace(".", "_") + "_neuron"] = out - (0 if after is None else after)

            module.register_forward_hook(keep, with_kwargs=True)
    return spikes, model(x_TNCHW)


@torch.no_grad()
def node_by_node(graph: nir.NIRGraph, make: Callable[[nir.LIF, torch.dtype], Neuron], x_TNCHW: Tensor):
    """The same, with each LIF a simulator's neuron."""
    sources = defaultdict(list)
    for source, target in graph.edges:
        sources[target].append(source)
    order, left = [], dict(graph.nodes)
    while left:
        ready = [name for name in left if not any(source in left for source in sources[name])]
        order += ready
        left = {name: node for name, node in left.items() if name not in ready}
    dtype = x_TNCHW.dtype
    neurons = {name: make(node, dtype) for name, node in graph.nodes.items() if isinstance(node, nir.LIF)}
    layers, logits = defaultdict(list), []
    for frame in x_TNCHW:
        values: dict[str, Tensor] = {}
        for name in order:
            node = graph.nodes[name]
            x = frame if isinstance(node, nir.Input) else torch.stack([values[s] for s in sources[name]]).sum(0)
            values[name] = (
                neurons[name](x).to(dtype) if name in neurons else stateless(node, x, dtype)
            )  # 0 and 1 in any
        at = defaultdict(list)
        for name in neurons:
            at[name.rpartition("_level")[0]].append(values[name])
        for layer, levels in at.items():
            layers[layer].append(sum(levels))
        logits.append(values["output"])
    return {layer: torch.stack(steps) for layer, steps in layers.items()}, torch.stack(logits).mean(0)


def stateless(node: nir.NIRNode, x: Tensor, dtype: torch.dtype) -> Tensor:
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


def whole_graph(name: str, path: Path, x_TNCHW: Tensor, expected: Tensor) -> str:
    """What comes of the simulator's own importer: its message, or how many of its predictions are ours."""
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
    except Exception as error:  # whatever it raises is the finding
        return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("network", type=Path)
    parser.add_argument("frames", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    x = torch.from_numpy(np.load(args.frames, allow_pickle=False))
    rows = []
    for dtype in (torch.float64, torch.float32):
        spikes, logits = ours(args.network, x.to(dtype))
        for name in IMPORTERS:
            version = importlib.metadata.version(name)
            row = {"simulator": name, "version": version, "precision": str(dtype)[6:], "samples": x.shape[1]}
            if name in NEURONS:
                found, their_logits = node_by_node(nir.read(args.network), NEURONS[name], x.to(dtype))
                same = (their_logits.argmax(1) == logits.argmax(1)).double().mean().item()
                shares = {layer: (found[layer] == spikes[layer]).double().mean().item() for layer in spikes}
                worst = min(shares, key=lambda layer: shares[layer])
                row |= {"same spikes, worst layer %": f"{100 * shares[worst]:.4f}", "worst layer": worst,
                        "same predictions %": f"{100 * same:.2f}"}  # fmt: skip
            if dtype == torch.float32:
                row["its own importer"] = whole_graph(name, args.network, x, logits)
            rows.append(row)
            print(row, flush=True)
    with args.out.open("w", newline="") as file:
        names = list(dict.fromkeys(name for row in rows for name in row))
        writer = csv.DictWriter(file, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
