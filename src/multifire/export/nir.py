"""Write a network as a graph of NIR, the neuromorphic intermediate representation, and read it back.

NIR's LIF is τ·dv/dt = v_leak - v + R·x; it spikes if v > v_threshold, and v becomes v_reset. With forward Euler,
dt = 1, τ = R = 1/(1 - decay), v_leak = v_reset = 0 and the reset in the step of the spike, it is a level of an MLF
neuron:

    v[t] = v[t-1] + (R·x[t] - v[t-1]) / τ = decay·v[t-1]·(1 - s[t-1]) + x[t]

A neuron of K levels is K LIF nodes with the same input, whose spikes are summed: NIR adds the outputs of all edges that
end in one node. Residual sums are such edges too. A NIR graph has no mean over time: the program that runs it must
average the logits over the frames.

Source: Pedersen et al., "Neuromorphic intermediate representation", Nature Communications 15 (2024), 8122; nir 1.0.8.
"""

import contextlib
import dataclasses
import hashlib
import io
import json
import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import nir
import numpy as np
import torch
from torch import Tensor, nn

from multifire.config import ModelConfig
from multifire.config.json_format import model_config
from multifire.config.parameters import count_parameters
from multifire.export.fold import fold
from multifire.export.graph import trace
from multifire.export.onnx_digest import MAX_TEXT_BYTES
from multifire.export.provenance import KEY, KEYS, stored
from multifire.nn import MLF, ConvFire, SpikingNetwork, config_of_model, model_from_config
from multifire.utils.files import write_atomic
from multifire.utils.hdf5_texts import Texts

NIR_VERSION = 1
DISCRETISATION = (
    "forward Euler, dt = 1: v[t] = v[t-1] + (v_leak - v[t-1] + r*x[t]) * dt/tau; spike where v[t] > v_threshold; "
    "v[t] = v_reset after a spike, in the same step; readout: mean of the output over the time steps"
)
MAX_BYTES = 4 << 30
"""Maximum size of all arrays of a file; a network of width 64 for 32 × 32 frames has 0.2 GB."""
MAX_ARRAY_BYTES = 1 << 29
"""Maximum size of one array."""
MAX_OBJECTS = 100_000
"""Maximum number of arrays or edges; DS-ResNet254 has 7,670 arrays and 9,913 edges."""
LEARNED = "neurons"
"""Key of the metadata with the learned numbers."""
METADATA = "node/metadata/"
DIGEST = f"{METADATA}digest"
KINDS = {"AvgPool2d", "Affine", "Conv2d", "Flatten", "Input", "LIF", "NIRGraph", "Output"}
"""Kinds of nodes in our graphs."""


class NirNodes:
    """A Target that collects NIR nodes and edges; a value is the names of the nodes whose outputs are summed."""

    def __init__(self, size: tuple[int, int]):
        self.nodes: dict[str, nir.NIRNode] = {}
        self.edges: list[tuple[str, str]] = []
        self._size = size
        self._shapes: dict[str, tuple[int, ...]] = {}

    def put(self, name: str, node: nir.NIRNode, x: list[str], shape: tuple[int, ...]) -> list[str]:
        """Add a node with input x and an output of this shape."""
        name = name.replace(".", "_")
        self.nodes[name], self._shapes[name] = node, shape
        self.edges += [(source, name) for source in x]
        return [name]

    def shift(self, x: list[str], mean: Tensor, name: str) -> list[str]:
        """Subtract the mean by a convolution with identity weights: NIR has no node for a bias alone."""
        channels = len(mean)
        weight = np.eye(channels, dtype=_array(mean).dtype)[:, :, None, None]
        node = nir.Conv2d(self._size, weight, (1, 1), (0, 0), (1, 1), 1, -_array(mean))
        return self.put(name, node, x, (channels, *self._size))

    def conv(self, x: list[str], conv: nn.Conv2d, name: str) -> list[str]:
        assert conv.bias is not None
        height, width = self._shapes[x[0]][1:]
        (row_stride, column_stride), (row_padding, column_padding) = conv.stride, conv.padding
        shape = (conv.out_channels, -(-height // row_stride), -(-width // column_stride))
        stride, padding = (row_stride, column_stride), (int(row_padding), int(column_padding))
        weight, bias = _array(conv.weight), _array(conv.bias)
        return self.put(name, nir.Conv2d((height, width), weight, stride, padding, (1, 1), 1, bias), x, shape)

    def fire(self, current: list[str], neuron: MLF, name: str) -> list[str]:
        shape = self._shapes[current[0]]
        dtype = next(iter(node.weight.dtype for node in self.nodes.values() if isinstance(node, nir.Conv2d)))
        tau, zero = np.full(shape, 1 / (1 - neuron.decay), dtype), np.zeros(shape, dtype)
        spikes = []
        for level, threshold in enumerate(neuron.thresholds):
            node = nir.LIF(tau=tau, r=tau, v_leak=zero, v_threshold=np.full(shape, threshold, dtype), v_reset=zero)
            spikes += self.put(f"{name}.level{level}", node, current, shape)
        return spikes

    def add(self, a: list[str], b: list[str], name: str) -> list[str]:
        return [*a, *b]

    def vote(self, x: list[str], voting: nn.Linear, name: str) -> list[str]:
        channels, height, width = self._shapes[x[0]]
        window = np.array([height, width])
        x = self.put("pool", nir.AvgPool2d(window, window, np.array([0, 0])), x, (channels, 1, 1))
        x = self.put("flatten", nir.Flatten({"input": np.array([channels, 1, 1])}, 0, -1), x, (channels,))
        return self.put(name, nir.Affine(_array(voting.weight), _array(voting.bias)), x, (voting.out_features,))


def _array(tensor: Tensor) -> np.ndarray:
    return np.ascontiguousarray(tensor.detach().cpu().numpy())


def to_nir(model: SpikingNetwork, size: tuple[int, int], metadata: dict[str, str] | None = None) -> nir.NIRGraph:
    """Return a network as a NIR graph for frames of H × W, in the network's precision.

    Args:
        model: the network; it is folded first, unless it is folded already.
        size: H, W of the frames.
        metadata: further texts for the graph's metadata.

    Raises:
        ValueError: the decay is not in [0, 1), or a neuron is no MLF neuron, so no LIF of NIR computes the same.
    """
    neurons = {name: module for name, module in model.named_modules() if isinstance(module, MLF)}
    for neuron in neurons.values():
        neuron.refuse_other_members("a LIF of NIR")
        if not 0 <= neuron.decay < 1:
            raise ValueError(f"decay is {neuron.decay}, expected 0 <= decay < 1: a LIF of NIR has τ = 1/(1 - decay)")
    folded = fold(model) if isinstance(model.stem, ConvFire) else model
    target = NirNodes(size)
    shape = (model.in_channels, *size)
    logits = trace(folded, target.put("input", nir.Input({"input": np.array(shape)}), [], shape), target)
    target.put("output", nir.Output({"output": np.array([model.num_classes])}), logits, (model.num_classes,))
    described = {
        "multifire": str(NIR_VERSION),
        "discretisation": DISCRETISATION,
        "dt": "1.0",
        "model": json.dumps(dataclasses.asdict(config_of_model(model))),
        **_learned_numbers(neurons),
    }
    return nir.NIRGraph(target.nodes, target.edges, metadata={**(metadata or {}), **described})


def _learned_numbers(neurons: dict[str, MLF]) -> dict[str, str]:
    """Return the metadata with each layer's thresholds and decay, if learned: a configuration has one value of each."""
    if not any(neuron.is_learned for neuron in neurons.values()):
        return {}
    numbers = {name: [list(neuron.thresholds), neuron.decay] for name, neuron in neurons.items()}
    return {LEARNED: json.dumps(numbers)}


def _set_learned_numbers(model: SpikingNetwork, graph: nir.NIRGraph, name: str) -> None:
    """Give the neurons of a network with constant thresholds the numbers that `_learned_numbers` wrote."""
    try:
        numbers = json.loads(graph.metadata[LEARNED])
        for key, neuron in model.named_modules():
            if isinstance(neuron, MLF):
                thresholds, decay = numbers[key]
                if len(thresholds) != neuron.levels or not 0 <= decay < 1 or not all(map(math.isfinite, thresholds)):
                    raise ValueError(f"those of {key} are {thresholds}, {decay}")
                neuron.initial_thresholds, neuron.initial_decay = tuple(map(float, thresholds)), float(decay)
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{name}: its metadata have no valid learned thresholds and decays ({error})") from None


def write_nir(path: Path, model: SpikingNetwork, size: tuple[int, int], provenance: dict[str, Any]) -> None:
    """Write a network with its provenance as a NIR file, after checking that `from_nir` reads the same weights back."""
    graph = to_nir(model, size, {KEY: json.dumps(provenance)})
    content = io.BytesIO()
    nir.write(content, graph)  # pyright: ignore[reportArgumentType] - it takes any binary file
    with h5py.File(content, "r+") as file:
        file[DIGEST] = _digest(_check_objects(file, Texts(content, str(path)), str(path)))
    again = from_nir(read_nir(io.BytesIO(content.getvalue()), str(path))).state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in from_nir(graph).state_dict().items())
    write_atomic(path, content.getvalue())


def from_nir(source: nir.NIRGraph | str | Path) -> SpikingNetwork:
    """Return the folded network of a NIR graph or file that multifire wrote.

    Raises:
        FileNotFoundError: no such file.
        ValueError: damaged, or not the graph of such a network; the message names the difference.
    """
    name = "graph" if isinstance(source, nir.NIRGraph) else str(source)
    graph = source if isinstance(source, nir.NIRGraph) else read_nir(source, name)
    cfg = _model_config(graph, name)
    size = _frame_size(graph, cfg, name)
    voting = graph.nodes["voting"]
    assert isinstance(voting, nir.Affine)
    constant = dataclasses.replace(cfg, learn_thresholds=False, learn_decay=False)
    model = fold(model_from_config(constant)).to(torch.from_numpy(voting.weight).dtype)
    if cfg != constant:
        _set_learned_numbers(model, graph, name)
    expected = to_nir(model, size)
    _check_graph(graph, expected, name)
    tensors = {}
    for key, tensor in model.state_dict().items():
        module, _, field = key.rpartition(".")
        node = graph.nodes[module.replace(".", "_")]
        assert isinstance(node, nir.Conv2d | nir.Affine)
        array = -node.bias if field == "mean" else getattr(node, field)
        tensors[key] = torch.from_numpy(np.ascontiguousarray(array)).view(tensor.shape)
    model.load_state_dict(tensors)
    return model


def _model_config(graph: nir.NIRGraph, name: str) -> ModelConfig:
    version = graph.metadata.get("multifire")
    if version != str(NIR_VERSION):
        found = "a graph of another program" if version is None else f"written by version {version}"
        raise ValueError(f"{name}: {found}, expected one that multifire wrote in version {NIR_VERSION}")
    try:
        values = json.loads(graph.metadata["model"])
    except (KeyError, TypeError, RecursionError, json.JSONDecodeError) as error:
        raise ValueError(f"{name}: its metadata do not describe its network ({error})") from None
    return model_config(values, name)


def _frame_size(graph: nir.NIRGraph, cfg: ModelConfig, name: str) -> tuple[int, int]:
    """Return H, W of the frames, after checking that the arrays' sizes fit the network that the metadata describe."""
    first = graph.nodes.get("stem_neuron_level0")
    shape = first.v_threshold.shape if isinstance(first, nir.LIF) else ()
    arrays = [n for n in graph.nodes.values() if isinstance(n, nir.Conv2d | nir.Affine)]
    numbers = sum(node.weight.size + node.bias.size for node in arrays)
    if len(shape) != 3 or shape[0] != cfg.width or not numbers <= count_parameters(cfg) <= 2 * numbers:
        raise ValueError(f"{name}: its nodes are not those of {cfg.name} of width {cfg.width}, which its metadata name")
    if not isinstance(graph.nodes.get("voting"), nir.Affine):
        raise ValueError(f"{name}: has no node 'voting' of kind Affine, expected the voting layer")
    return shape[1:]


def _check_graph(graph: nir.NIRGraph, expected: nir.NIRGraph, name: str) -> None:
    """Raise a ValueError if a node, shape, constant or edge differs from the network's; weights and biases may."""
    if graph.nodes.keys() != expected.nodes.keys():
        different = sorted(graph.nodes.keys() ^ expected.nodes.keys())
        raise ValueError(f"{name}: its nodes are not those of its network: extra or missing {', '.join(different[:5])}")
    if Counter(map(tuple, graph.edges)) != Counter(expected.edges):
        different = sorted(set(map(tuple, graph.edges)) ^ set(expected.edges)) or ["a repeated edge"]
        raise ValueError(f"{name}: its edges are not those of its network: extra or missing {different[0]}")
    for key, node in expected.nodes.items():
        found = graph.nodes[key]
        if type(found) is not type(node):
            raise ValueError(f"{name}: {key} is a {type(found).__name__}, expected a {type(node).__name__}")
        values = found.to_dict()
        for field, value in node.to_dict().items():
            if field in ("type", "metadata"):
                continue
            array, constant = np.asarray(values[field]), np.asarray(value)
            is_learned = field in ("weight", "bias") and not (key == "input_norm" and field == "weight")
            fits = array.shape == constant.shape and array.dtype.kind == constant.dtype.kind
            if not fits or not (np.isfinite(array).all() if is_learned else np.array_equal(array, constant)):
                raise ValueError(f"{name}: {field} of {key} does not fit its network, or is not finite")


def read_nir(source: str | Path | io.BytesIO, name: str) -> nir.NIRGraph:
    """Read a graph from a file; refuse links, unbounded compression and unknown kinds of objects.

    Raises:
        FileNotFoundError: no such file.
        ValueError: damaged, or refused; `name` names the file in messages.
    """
    if not isinstance(source, io.BytesIO) and not Path(source).is_file():
        raise FileNotFoundError(f"{name}: no such file")
    with _errors_named(name):
        with _opened(source, name) as (file, texts):
            _check_objects(file, texts, name)
        return nir.read(source)  # pyright: ignore[reportArgumentType] - h5py takes any binary file


def read_metadata(path: Path) -> tuple[str, str]:
    """Check the digest of a file that `write_nir` wrote; return its content, in words, and its provenance, as text.

    Raises:
        ValueError: damaged, altered, or written by another program.
    """
    with _errors_named(str(path)), _opened(path, str(path)) as (file, texts):
        arrays = _check_objects(file, texts, str(path))
        keys = [key for key in ("digest", *KEYS) if f"{METADATA}{key}" in arrays]
        texts = {key: str(arrays[f"{METADATA}{key}"].asstr()[()]) for key in keys}
        provenance = stored(texts)
        if "digest" not in texts or provenance is None:
            raise ValueError(f"{path}: a file without provenance or digest, expected one that multifire exported")
        if texts["digest"] != _digest(arrays):
            raise ValueError(f"{path}: damaged: its content does not match its digest; use another one")
        nodes = {key.split("/")[2] for key in arrays if key.startswith("node/nodes/")}
        return f"NIR graph, {len(nodes)} nodes, {path.stat().st_size:,} bytes", provenance


@contextlib.contextmanager
def _opened(source: str | Path | io.BytesIO, name: str) -> Iterator[tuple[h5py.File, Texts]]:
    """Open a file; h5py must read only those of its texts that have been read from `Texts` before."""
    with contextlib.nullcontext(source) if isinstance(source, io.BytesIO) else Path(source).open("rb") as content:
        texts = Texts(content, name)
        with h5py.File(source, "r") as file:
            yield file, texts


@contextlib.contextmanager
def _errors_named(name: str) -> Iterator[None]:
    """Turn the errors that h5py and nir raise for a damaged file into a ValueError that names the file."""
    try:
        yield
    except (OSError, KeyError, TypeError, AttributeError, AssertionError, RuntimeError, UnicodeError) as error:
        raise ValueError(f"{name}: damaged, or not a file of NIR ({' '.join(str(error).split())[:200]})") from None


def _is_text(item: h5py.Dataset) -> bool:
    return h5py.check_string_dtype(item.dtype) is not None


def _digest(arrays: dict[str, h5py.Dataset]) -> str:
    """Return the SHA-256 of all names, types, shapes and values except the digest itself."""
    sha = hashlib.sha256()
    for key, item in sorted(arrays.items()):
        if key == DIGEST:
            continue
        text = json.dumps(np.asarray(item.asstr()[()]).tolist()) if _is_text(item) else None
        kind = "text" if _is_text(item) else item.dtype
        sha.update(f"{key} {kind} {item.shape} ".encode())
        sha.update(np.ascontiguousarray(item[()]).reshape(-1).data if text is None else text.encode())
    return sha.hexdigest()


def _check_objects(file: h5py.File, texts: Texts, name: str) -> dict[str, h5py.Dataset]:
    """Return the arrays and texts of a file by path.

    Raises:
        ValueError: links, external storage, filters other than gzip, unknown kinds of objects, or too much data.
    """
    arrays: dict[str, h5py.Dataset] = {}
    pending: list[tuple[h5py.Group, int]] = [(file, 0)]
    total_bytes = objects = 0
    while pending:
        group, depth = pending.pop()
        for key in map(str, group):
            objects += 1
            if not isinstance(group.get(key, getlink=True), h5py.HardLink) or depth > 5 or objects > MAX_OBJECTS:
                raise ValueError(f"{name}: {key} is a link, nested too deep, or one object too many; use another file")
            item = group[key]
            if isinstance(item, h5py.Group):
                pending.append((item, depth + 1))
                continue
            if not isinstance(item, h5py.Dataset):
                raise ValueError(f"{name}: {key} is a type, expected numbers or text")
            _check_array(item, key, name)
            total_bytes += item.nbytes + (_text_bytes(item, texts, name) if _is_text(item) else 0)
            if key == "type" and _is_text(item) and (kind := item.asstr()[()]) not in KINDS:
                raise ValueError(f"{name}: has a node of kind {kind!r}, expected one of {', '.join(sorted(KINDS))}")
            if total_bytes > MAX_BYTES:
                raise ValueError(f"{name}: unpacks to more than {MAX_BYTES / 1e9:.0f} GB; use another file")
            arrays[f"{group.name}/{key}".lstrip("/")] = item
    return arrays


def _check_array(item: h5py.Dataset, key: str, name: str) -> None:
    """Raise a ValueError for an array or text with external storage, another filter, another type, or too much data."""
    properties = item.id.get_create_plist()
    filters = {properties.get_filter(i)[0] for i in range(properties.get_nfilters())}
    if item.external or item.is_virtual or not filters <= {h5py.h5z.FILTER_DEFLATE, h5py.h5z.FILTER_SHUFFLE}:
        raise ValueError(f"{name}: {key} is stored in another file or packed by another filter than gzip")
    if not _is_text(item) and item.dtype.kind not in "fiub":
        raise ValueError(f"{name}: {key} is of {item.dtype}, expected numbers or text")
    unpacked = max(item.nbytes, math.prod(item.chunks or ()) * item.dtype.itemsize)  # HDF5 unpacks whole chunks
    if unpacked > MAX_ARRAY_BYTES:
        raise ValueError(f"{name}: {key} unpacks to more than {MAX_ARRAY_BYTES / 1e9:.1f} GB; use another file")


def _text_bytes(item: h5py.Dataset, texts: Texts, name: str) -> int:
    """Return the size of texts in memory, which in the file may share one copy."""
    if item.shape != () and (item.shape[1:] != (2,) or len(item) > MAX_OBJECTS):
        raise ValueError(f"{name}: {item.name} is text of shape {item.shape}, expected one text or pairs of names")
    if not item.dtype.hasobject:  # texts of one length, which lie in the array itself
        return 0
    offset = item.id.get_offset()
    if offset is None:
        raise ValueError(f"{name}: {item.name} is text in pieces, expected it in one; use another file")
    text_bytes = 0
    for text in texts.at(offset, math.prod(item.shape)):
        text_bytes += len(text)
        if text_bytes > MAX_TEXT_BYTES:
            raise ValueError(f"{name}: {item.name} unpacks to more than {MAX_TEXT_BYTES >> 20} MB of text")
    return text_bytes
