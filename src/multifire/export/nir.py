"""A network as a graph of NIR, the neuromorphic intermediate representation, and back.

NIR's LIF is τ·dv/dt = v_leak - v + R·x, with a spike where v > v_threshold, after which v is v_reset. Forward Euler
with dt = 1, τ = R = 1/(1 - decay), v_leak = v_reset = 0, the reset in the step of the spike, makes of it

    v[t] = v[t-1] + (R·x[t] - v[t-1]) / τ = decay·v[t-1]·(1 - s[t-1]) + x[t]

which is a level of an MLF neuron. A neuron of K levels is K LIF nodes with the same input, whose spikes are summed; NIR
sums where several edges end in one node, and residual sums are such edges too. NIR has no time: the mean of the logits
over the frames is the reader's to take.

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
from multifire.export.provenance import KEY, KEYS
from multifire.nn import MLF, ConvFire, SpikingResNet, config_of_model, model_from_config
from multifire.utils.files import write_atomic

NIR_VERSION = 1
DISCRETISATION = (
    "forward Euler, dt = 1: v[t] = v[t-1] + (v_leak - v[t-1] + r*x[t]) * dt/tau; spike where v[t] > v_threshold; "
    "v[t] = v_reset after a spike, in the same step; readout: mean of the output over the time steps"
)
MOST_BYTES = 4 << 30
"""Maximum size of all arrays of a file; a network of width 64 for 32 × 32 frames has 0.2 GB."""
MOST_OF_ONE = 1 << 29
"""Maximum size of one array."""
MOST_OBJECTS = 100_000
"""Maximum number of arrays or edges; DS-ResNet254 has 7,670 arrays and 9,913 edges."""
DIGEST = "node/metadata/digest"
PROVENANCES = tuple(f"node/metadata/{key}" for key in KEYS)
KINDS = {"AvgPool2d", "Affine", "Conv2d", "Flatten", "Input", "LIF", "NIRGraph", "Output"}


class NirNodes:
    """A Target that collects nodes and edges; a value is a list of nodes whose outputs are summed."""

    def __init__(self, size: tuple[int, int]):
        self.nodes: dict[str, nir.NIRNode] = {}
        self.edges: list[tuple[str, str]] = []
        self._size = size
        self._shapes: dict[str, tuple[int, ...]] = {}

    def put(self, name: str, node: nir.NIRNode, x: list[str], shape: tuple[int, ...]) -> list[str]:
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


def to_nir(model: SpikingResNet, size: tuple[int, int], metadata: dict[str, str] | None = None) -> nir.NIRGraph:
    """Return the network, folded if it is not, as a NIR graph for frames of H × W, in the model's precision.

    Raises:
        ValueError: a decay that no leak of NIR's LIF has.
    """
    decay = model.stem.neuron.decay
    if not 0 <= decay < 1:
        raise ValueError(f"decay is {decay}, expected 0 <= decay < 1: a LIF of NIR has τ = 1/(1 - decay)")
    folded = fold(model) if isinstance(model.stem, ConvFire) else model
    target = NirNodes(size)
    shape = (model.in_channels, *size)
    logits = trace(folded, target.put("input", nir.Input({"input": np.array(shape)}), [], shape), target)
    target.put("output", nir.Output({"output": np.array([model.num_classes])}), logits, (model.num_classes,))
    own = {"multifire": str(NIR_VERSION), "discretisation": DISCRETISATION, "dt": "1.0"}
    described = json.dumps(dataclasses.asdict(config_of_model(model)))
    return nir.NIRGraph(target.nodes, target.edges, metadata={**(metadata or {}), **own, "model": described})


def write_nir(path: Path, model: SpikingResNet, size: tuple[int, int], provenance: dict[str, Any]) -> None:
    """Write a network with its provenance as a NIR file, after checking that it reads back as the same graph."""
    graph = to_nir(model, size, {KEY: json.dumps(provenance)})
    content = io.BytesIO()
    nir.write(content, graph)  # pyright: ignore[reportArgumentType] - it takes any binary file
    with h5py.File(content, "r+") as file:
        file[DIGEST] = _digest(_check_objects(file, str(path)))
    again = from_nir(read_nir(io.BytesIO(content.getvalue()), str(path))).state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in from_nir(graph).state_dict().items())
    write_atomic(path, content.getvalue())


def from_nir(source: nir.NIRGraph | str | Path) -> SpikingResNet:
    """Return the folded network of a NIR graph or file that multifire made.

    Raises:
        FileNotFoundError: no such file.
        ValueError: damaged, or not the graph of such a network; names the difference.
    """
    name = "graph" if isinstance(source, nir.NIRGraph) else str(source)
    graph = source if isinstance(source, nir.NIRGraph) else read_nir(source, name)
    cfg = _model_config(graph, name)
    size = _frame_size(graph, cfg, name)
    voting = graph.nodes["voting"]
    assert isinstance(voting, nir.Affine)
    model = fold(model_from_config(cfg)).to(torch.from_numpy(voting.weight).dtype)
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
        raise ValueError(f"{name}: its metadata do not say its model ({error})") from None
    return model_config(values, name)


def _frame_size(graph: nir.NIRGraph, cfg: ModelConfig, name: str) -> tuple[int, int]:
    """Return H, W of the frames, after checking that the graph's arrays are as large as its metadata claim."""
    first = graph.nodes.get("stem_neuron_level0")
    shape = first.v_threshold.shape if isinstance(first, nir.LIF) else ()
    arrays = [n for n in graph.nodes.values() if isinstance(n, nir.Conv2d | nir.Affine)]
    numbers = sum(node.weight.size + node.bias.size for node in arrays)
    if len(shape) != 3 or shape[0] != cfg.width or not numbers <= count_parameters(cfg) <= 2 * numbers:
        raise ValueError(f"{name}: its nodes are not those of {cfg.name} with width {cfg.width}, as its metadata say")
    if not isinstance(graph.nodes.get("voting"), nir.Affine):
        raise ValueError(f"{name}: has no voting layer")
    return shape[1:]


def _check_graph(graph: nir.NIRGraph, expected: nir.NIRGraph, name: str) -> None:
    """Check that all nodes, shapes, constants and edges are those of this network, except weights and biases."""
    if graph.nodes.keys() != expected.nodes.keys():
        odd = sorted(graph.nodes.keys() ^ expected.nodes.keys())
        raise ValueError(f"{name}: its nodes are not those of its network: {', '.join(odd[:5])} too many or missing")
    if Counter(map(tuple, graph.edges)) != Counter(expected.edges):
        odd = sorted(set(map(tuple, graph.edges)) ^ set(expected.edges)) or ["an edge twice"]
        raise ValueError(f"{name}: its edges are not those of its network: {odd[0]} too many or missing")
    for key, node in expected.nodes.items():
        found = graph.nodes[key]
        if type(found) is not type(node):
            raise ValueError(f"{name}: {key} is a {type(found).__name__}, expected a {type(node).__name__}")
        values = found.to_dict()
        for field, value in node.to_dict().items():
            if field in ("type", "metadata"):
                continue
            array, wanted = np.asarray(values[field]), np.asarray(value)
            free = field in ("weight", "bias") and not (key == "input_norm" and field == "weight")
            same = array.shape == wanted.shape and array.dtype.kind == wanted.dtype.kind
            if not same or (free and not np.isfinite(array).all()) or not (free or np.array_equal(array, wanted)):
                raise ValueError(f"{name}: {field} of {key} is not what this network's would be, or not finite")


def read_nir(source: str | Path | io.BytesIO, name: str) -> nir.NIRGraph:
    """Read a graph from a file without external links, unbounded compression or unknown kinds of objects.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is not such a file.
    """
    if not isinstance(source, io.BytesIO) and not Path(source).is_file():
        raise FileNotFoundError(f"{name}: no such file")
    with _damage_named(name):
        with h5py.File(source, "r") as file:
            _check_objects(file, name)
        return nir.read(source)  # pyright: ignore[reportArgumentType] - h5py takes any binary file


def read_metadata(path: Path) -> tuple[str, str]:
    """Return the content, in words, and the provenance, as text, of a file that `write_nir` made.

    Raises:
        ValueError: damaged, altered, or another program's.
    """
    with _damage_named(str(path)), h5py.File(path, "r") as file:
        arrays = _check_objects(file, str(path))
        texts = {key: str(arrays[key].asstr()[()]) for key in (DIGEST, *PROVENANCES) if key in arrays}
        digest, provenance = texts.get(DIGEST), next((texts[key] for key in PROVENANCES if key in texts), None)
        if digest is None or provenance is None:
            raise ValueError(f"{path}: a file without provenance or digest, not as multifire exports it")
        if digest != _digest(arrays):
            raise ValueError(f"{path}: damaged: its content does not match its digest; use another one")
        nodes = {key.split("/")[2] for key in arrays if key.startswith("node/nodes/")}
        return f"NIR graph, {len(nodes)} nodes, {path.stat().st_size:,} bytes", provenance


@contextlib.contextmanager
def _damage_named(name: str) -> Iterator[None]:
    """Turn the errors of h5py and nir for a file's content into a ValueError that names the file."""
    try:
        yield
    except (OSError, KeyError, TypeError, AttributeError, AssertionError, RuntimeError, UnicodeError) as error:
        raise ValueError(f"{name}: damaged, or not a file of NIR ({' '.join(str(error).split())[:200]})") from None


def _is_text(item: h5py.Dataset) -> bool:
    return h5py.check_string_dtype(item.dtype) is not None


def _digest(arrays: dict[str, h5py.Dataset]) -> str:
    """Return the digest of all names, types, shapes and values except the digest itself, independent of compression."""
    sha = hashlib.sha256()
    for key, item in sorted(arrays.items()):
        if key == DIGEST:
            continue
        text = json.dumps(np.asarray(item.asstr()[()]).tolist()) if _is_text(item) else None
        kind = "text" if _is_text(item) else item.dtype
        sha.update(f"{key} {kind} {item.shape} ".encode())
        sha.update(np.ascontiguousarray(item[()]).reshape(-1).data if text is None else text.encode())
    return sha.hexdigest()


def _check_objects(file: h5py.File, name: str) -> dict[str, h5py.Dataset]:
    """Return the arrays and texts by path.

    Raises:
        ValueError: links, storage elsewhere, filters other than gzip, kinds that are not ours, and size.
    """
    found: dict[str, h5py.Dataset] = {}
    left: list[tuple[h5py.Group, int]] = [(file, 0)]
    total = objects = 0
    while left:
        group, depth = left.pop()
        for key in map(str, group):
            objects += 1
            if not isinstance(group.get(key, getlink=True), h5py.HardLink) or depth > 5 or objects > MOST_OBJECTS:
                raise ValueError(f"{name}: {key} is a link to elsewhere, too deep or too many; not a file of ours")
            item = group[key]
            if isinstance(item, h5py.Group):
                left.append((item, depth + 1))
                continue
            if not isinstance(item, h5py.Dataset):
                raise ValueError(f"{name}: {key} is a type, expected numbers or text")
            _check_array(item, key, name)
            total += item.nbytes + (_text_bytes(item, name) if _is_text(item) else 0)
            if total > MOST_BYTES:
                raise ValueError(f"{name}: unpacks to more than {MOST_BYTES / 1e9:.0f} GB; not a network of ours")
            found[f"{group.name}/{key}".lstrip("/")] = item
    return found


def _check_array(item: h5py.Dataset, key: str, name: str) -> None:
    properties = item.id.get_create_plist()
    filters = {properties.get_filter(i)[0] for i in range(properties.get_nfilters())}
    if item.external or item.is_virtual or not filters <= {h5py.h5z.FILTER_DEFLATE, h5py.h5z.FILTER_SHUFFLE}:
        raise ValueError(f"{name}: {key} is stored elsewhere or packed by another filter than gzip")
    if not _is_text(item) and item.dtype.kind not in "fiub":
        raise ValueError(f"{name}: {key} is of {item.dtype}, expected numbers or text")
    unpacked = max(item.nbytes, math.prod(item.chunks or ()) * item.dtype.itemsize)  # a chunk is unpacked whole
    if unpacked > MOST_OF_ONE:
        raise ValueError(f"{name}: {key} unpacks to more than {MOST_OF_ONE / 1e9:.1f} GB; not a network of ours")
    if key == "type" and _is_text(item) and (kind := item.asstr()[()]) not in KINDS:
        raise ValueError(f"{name}: has a node of kind {kind!r}, which no network of ours has")


def _text_bytes(item: h5py.Dataset, name: str) -> int:
    """Return the memory of texts, read one by one: in the file they may share one copy."""
    if item.shape == ():
        return len(item[()])
    if item.shape[1:] != (2,) or len(item) > MOST_OBJECTS:
        raise ValueError(f"{name}: {item.name} is text of shape {item.shape}, expected pairs of names")
    total = 0
    for pair in item:
        total += sum(map(len, pair))
        if total > MAX_TEXT_BYTES:
            raise ValueError(f"{name}: {item.name} unpacks to more than {MAX_TEXT_BYTES >> 20} MB of text")
    return total
