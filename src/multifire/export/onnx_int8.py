"""Export an int8 network to ONNX: the graph of `onnx.py` with int8 weights and exact integer sums.

Activations are the same integers as in `int8.py`. A convolution's integer sums are multiplied by a scale per channel,
and a bias is added: per channel, or per pixel for a stem with an input norm, as in `Int8MLF`.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import helper
from torch import Tensor, nn

from multifire.export.fold import fold
from multifire.export.int8 import SAMPLES_AT_ONCE, Int8Conv2d, Int8MLF, Int8Network
from multifire.export.onnx import OnnxStep, check_predictions, metadata, onnx_graph, run_frames, zero_states
from multifire.export.onnx_digest import append_digest
from multifire.nn import SpikingNetwork
from multifire.utils.files import write_atomic

FLOAT = onnx.TensorProto.FLOAT
MAX_DIFFERENT_ACTIVATIONS = 1e-3
"""Maximum fraction of a layer's activations that may differ: a spike at its threshold may flip by rounding."""


class Int8Step(OnnxStep):
    """An OnnxStep that replaces the convolutions of a folded network by those of its int8 network."""

    def __init__(self, size: tuple[int, int], network: Int8Network):
        super().__init__(size, np.float32)
        self._network = network.network

    def shift(self, x: str, mean: Tensor, name: str) -> str:
        return x if self._network.input_norm is None else super().shift(x, mean, name)

    def conv(self, x: str, conv: nn.Conv2d, name: str) -> str:
        layer = self._network.get_submodule(name.removesuffix(".conv"))
        assert isinstance(layer, Int8MLF)
        if not isinstance(layer.conv, Int8Conv2d):
            return super().conv(x, conv, name)
        sums = self._shaped(self._sums(x, layer.conv, name), x, conv)
        scale, bias = layer.scale, layer.bias_at(*self._shapes[sums][1:])
        scaled = self.node("Mul", [sums, self.constant(f"{name}.scale", _per_pixel(scale))], f"{name}.scaled")
        out = self.node("Add", [scaled, self.constant(f"{name}.bias", _per_pixel(bias))], f"{name}.out")
        self._shapes[out] = self._shapes[sums]
        return out

    def _sums(self, x: str, conv: Int8Conv2d, name: str) -> str:
        """Add a convolution whose sums are exact in float32: `Int8Conv2d.check_sums` limits them to 2^24.

        ConvInteger is not used: it takes twice the time in ONNX Runtime and accepts no counts above 255.
        """
        weight = self.node("Cast", [self.constant(f"{name}.weight", conv.weight)], f"{name}.floats", to=FLOAT)
        return self.node("Conv", [x, weight], f"{name}.sums", strides=conv.stride, pads=conv.padding * 2)


def _per_pixel(values: Tensor) -> Tensor:
    """Return values [O] as [O, 1, 1], and values [O, H, W] unchanged."""
    return values.view(-1, 1, 1) if values.dim() == 1 else values


def write_onnx_int8(
    path: Path,
    model: SpikingNetwork,
    network: Int8Network,
    size: tuple[int, int],
    provenance: dict[str, Any],
    *,
    step: bool = False,
) -> None:
    """Write an int8 network with its provenance as an ONNX file, after checking that the file computes the same.

    Args:
        path: file to write.
        model: the trained network.
        network: its int8 network.
        size: H, W of the frames.
        provenance: stored in the file's metadata.
        step: write the graph of one time step, not that of a sequence.

    Raises:
        ValueError: the file computes something else than the int8 network; nothing is written.
    """
    folded = fold(model).cpu().float()
    graph = onnx_graph(folded, size, step=step, target=Int8Step(size, network))
    helper.set_model_props(graph, metadata(provenance, step, "int8"))
    content = graph.SerializeToString()
    check(content, folded, network, size, step=step)
    write_atomic(path, append_digest(content))


@torch.no_grad()
def check(content: bytes, folded: SpikingNetwork, network: Int8Network, size: tuple[int, int], *, step: bool) -> None:
    """Compare an ONNX file with its int8 network on a few frames: the activations of each layer, and the predictions.

    Raises:
        ValueError: more than MAX_DIFFERENT_ACTIVATIONS or MAX_DIFFERENT_PREDICTIONS of them differ.
    """
    noise = torch.Generator().manual_seed(0)
    shape = (3, 2 * SAMPLES_AT_ONCE, folded.in_channels, *size)
    counts, image = torch.randint(0, 4, shape, generator=noise).float(), torch.randn(shape, generator=noise)
    x_TNCHW = counts if network.counts else image
    expected, logits_NL = activations(network, x_TNCHW)
    found = _onnx_activations(onnx_graph(folded, size, step=True, target=Int8Step(size, network)), expected, x_TNCHW)
    for name, values in expected.items():
        different = (values != found[name]).mean()
        if different > MAX_DIFFERENT_ACTIVATIONS:
            raise ValueError(
                f"{100 * different:.1f} % of the activations of {name} differ in ONNX Runtime, expected at most "
                f"{100 * MAX_DIFFERENT_ACTIVATIONS:.1f} %; nothing is written"
            )
    found_NL = run_frames(_session(content).run, onnx.load_from_string(content), x_TNCHW.numpy(), step)
    check_predictions(found_NL, logits_NL)


def activations(network: Int8Network, x_TNCHW: Tensor) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Return the output [T, N, C, H, W] of each firing layer by its name in the ONNX graph, and the logits."""
    parts: dict[str, list[Tensor]] = {}
    layers = {name: layer for name, layer in network.network.named_modules() if isinstance(layer, Int8MLF)}
    hooks = [
        layer.register_forward_hook(lambda *args, name=name: parts.setdefault(_graph_name(name), []).append(args[2]))
        for name, layer in layers.items()
    ]
    logits = network(x_TNCHW)
    for hook in hooks:
        hook.remove()
    return {name: torch.cat(part, 1).numpy() for name, part in parts.items()}, logits.numpy()


def _graph_name(layer: str) -> str:
    """Return the name of a layer's output in the ONNX graph, in which a separate node adds a block's shortcut."""
    return f"{layer.removesuffix('.fire2')}.add.out" if layer.endswith(".fire2") else f"{layer}.neuron.out"


def _onnx_activations(step: onnx.ModelProto, names: Iterable[str], x_TNCHW: Tensor) -> dict[str, np.ndarray]:
    """Return the values [T, N, ...] of the named nodes in ONNX Runtime; adds them to the step's outputs."""
    step.graph.output.extend(helper.make_tensor_value_info(name, FLOAT, None) for name in names)
    run, states = _session(step.SerializeToString()).run, zero_states(step, x_TNCHW.shape[1])
    frames = []
    for frame_NCHW in x_TNCHW.numpy():
        _, *outputs = run(None, {"frame": frame_NCHW, **states})
        states = dict(zip(states, outputs, strict=False))
        frames.append(outputs[len(states) :])
    return {name: np.stack(steps) for name, steps in zip(names, zip(*frames, strict=True), strict=True)}


def _session(content: bytes) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
