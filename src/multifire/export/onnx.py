"""Export a network to ONNX with standard operators only, for any ONNX runtime.

The graph of a step takes a frame [N, C, H, W] and every layer's membranes after the reset [K, N, C, H, W], or
[1, N, C, H, W] if the levels share one, and returns the frame's logits [N, classes] and the new membranes. The graph of
a sequence [T, N, C, H, W] is ONNX's Scan over that step and the mean of its logits. T and N are free. torch's exporter
is not used: it unrolls time, takes minutes, and writes the machine's paths into the file.
"""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from torch import Tensor, nn

from multifire.export.fold import fold
from multifire.export.graph import trace
from multifire.export.onnx_digest import append_digest
from multifire.export.provenance import KEY
from multifire.nn import MLF, SpikingNetwork
from multifire.utils.files import write_atomic

OPSET = 18
IR_VERSION = 9
"""IR version of ONNX 1.14, which has opset 18; older runtimes read it too."""
MAX_DIFFERENT_PREDICTIONS = 0.1
"""Maximum fraction of samples whose prediction may differ in fp32, in which a spike at its threshold may flip."""


class OnnxStep:
    """A Target that collects the ONNX nodes of one time step; a value is the name of a node's output."""

    def __init__(self, size: tuple[int, int], dtype: type):
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, onnx.TensorProto] = {}
        self.membranes: list[tuple[str, str, tuple[int, int, int, int]]] = []
        """For each layer, the names of its membranes before and after the step, and K, C, H, W."""
        self._size, self._dtype = size, dtype
        self._shapes: dict[str, tuple[int, int, int]] = {}

    def node(self, op: str, inputs: list[str], name: str, **attributes: Any) -> str:
        """Add a node with one output; return the output's name, which is also the node's."""
        self.nodes.append(helper.make_node(op, inputs, [name], name=name, **attributes))
        return name

    def constant(self, name: str, value: Tensor | np.ndarray) -> str:
        """Add a constant, with floats in the graph's type; return its name."""
        array = np.asarray(value.detach().cpu() if isinstance(value, Tensor) else value)
        array = array.astype(self._dtype) if array.dtype.kind == "f" else array
        self.constants[name] = numpy_helper.from_array(np.ascontiguousarray(array), name)
        return name

    def shift(self, x: str, mean: Tensor, name: str) -> str:
        return self.node("Sub", [x, self.constant(f"{name}.mean", mean.view(-1, 1, 1))], f"{name}.out")

    def conv(self, x: str, conv: nn.Conv2d, name: str) -> str:
        weight, bias = self.constant(f"{name}.weight", conv.weight), self.constant(f"{name}.bias", _bias(conv))
        padding = [int(p) for p in conv.padding]
        out = self.node("Conv", [x, weight, bias], f"{name}.out", strides=list(conv.stride), pads=padding * 2)
        return self._shaped(out, x, conv)

    def fire(self, current: str, neuron: MLF, name: str) -> str:
        before, after = f"{name}.before", f"{name}.after"
        decayed = self.node("Mul", [before, self.constant(f"{name}.decay", np.array(neuron.decay))], f"{name}.decayed")
        u = self.node("Add", [decayed, current], f"{name}.u")
        thresholds = np.array(neuron.thresholds, self._dtype).reshape(-1, 1, 1, 1, 1)
        theta = self.constant(f"{name}.thresholds", thresholds)
        fired = self.node("Greater", [u, theta], f"{name}.fired")
        spikes = self.node("Cast", [fired], f"{name}.spikes", to=_element(self._dtype))
        if neuron.signed:
            falls = self.node("Less", [u, self.constant(f"{name}.negative", -thresholds)], f"{name}.falls")
            negative = self.node("Cast", [falls], f"{name}.falling", to=_element(self._dtype))
            spikes = self.node("Sub", [spikes, negative], f"{name}.signed")
            fired = self.node("Or", [fired, falls], f"{name}.either")
        axis = self.constant("first_axis", np.array([0]))
        out = self.node("ReduceSum", [spikes, axis], f"{name}.out", keepdims=0)
        self._reset(u, theta, spikes, fired, neuron, name)
        shape = self._shapes[out] = self._shapes[current]
        self.membranes.append((before, after, (1 if neuron.membranes == "shared" else neuron.levels, *shape)))
        return out

    def _reset(self, u: str, theta: str, spikes: str, fired: str, neuron: MLF, name: str) -> None:
        """Add what the membranes keep, as `multifire.ops.reference` does."""
        after = f"{name}.after"
        if neuron.reset == "subtract":
            axis = self.constant("first_axis", np.array([0]))
            if neuron.membranes == "shared":
                cost = self.node("ReduceSum", [spikes, axis], f"{name}.cost", keepdims=1)
            else:
                cost = self.node("Mul", [theta, spikes], f"{name}.cost")
            self.node("Sub", [u, cost], after)
            return
        if neuron.reset == "any":  # if any level fires, the first does
            fired = self.node("Gather", [fired, self.constant("first_level", np.array([0]))], f"{name}.any", axis=0)
        self.node("Where", [fired, self.constant("zero", np.array(0.0)), u], after)

    def add(self, a: str, b: str, name: str) -> str:
        out = self.node("Add", [a, b], f"{name}.out")
        self._shapes[out] = self._shapes[a]
        return out

    def vote(self, x: str, voting: nn.Linear, name: str) -> str:
        axes = self.constant("pixel_axes", np.array([2, 3]))
        mean = self.node("ReduceMean", [x, axes], f"{name}.mean", keepdims=0)
        weight, bias = self.constant(f"{name}.weight", voting.weight), self.constant(f"{name}.bias", voting.bias)
        return self.node("Gemm", [mean, weight, bias], "frame_logits", transB=1)

    def _shaped(self, out: str, x: str, conv: nn.Conv2d) -> str:
        height, width = self._shapes[x][1:] if x in self._shapes else self._size
        self._shapes[out] = (conv.out_channels, -(-height // conv.stride[0]), -(-width // conv.stride[1]))
        return out


def _bias(conv: nn.Conv2d) -> Tensor:
    assert conv.bias is not None
    return conv.bias


def _element(dtype: type) -> int:
    return helper.np_dtype_to_tensor_dtype(np.dtype(dtype))


def onnx_graph(
    folded: SpikingNetwork,
    size: tuple[int, int],
    *,
    step: bool = False,
    dtype: type = np.float32,
    target: OnnxStep | None = None,
) -> onnx.ModelProto:
    """Return the ONNX graph of a folded network for a sequence of frames or, with `step`, for one frame.

    Args:
        folded: the network.
        size: H, W of the frames.
        step: build the graph of one time step.
        dtype: NumPy type of weights, inputs and outputs.
        target: collects the nodes; None is an `OnnxStep`.
    """
    target = target or OnnxStep(size, dtype)
    logits = trace(folded, "frame", target)
    element, frame = _element(dtype), ["N", folded.in_channels, *size]
    states = [
        (before, after, [levels, "N", channels, height, width])
        for before, after, (levels, channels, height, width) in target.membranes
    ]
    inputs = [helper.make_tensor_value_info("frame", element, frame)]
    outputs = [helper.make_tensor_value_info(logits, element, ["N", folded.num_classes])]
    before = [helper.make_tensor_value_info(name, element, shape) for name, _, shape in states]
    after = [helper.make_tensor_value_info(name, element, shape) for _, name, shape in states]
    if step:
        graph = helper.make_graph(
            target.nodes, "step", [*inputs, *before], [*outputs, *after], list(target.constants.values())
        )
    else:
        body = helper.make_graph(target.nodes, "step", [*before, *inputs], [*after, *outputs])
        graph = _sequence(body, target, [shape for *_, shape in states], folded.num_classes, frame, element)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)
    onnx.checker.check_model(model, full_check=True)
    return model


def _sequence(
    body: onnx.GraphProto, target: OnnxStep, shapes: list[list], classes: int, frame: list, element: int
) -> onnx.GraphProto:
    """Return a graph that scans the step over time, from zero membranes, and averages its logits."""
    outer = OnnxStep((0, 0), np.float32)
    batch = outer.node("Shape", ["x"], "batch", start=1, end=2)
    zero = helper.make_tensor("value", element, [1], [0])
    initial, final = [], []
    for (before, after, _), (levels, _, *rest) in zip(target.membranes, shapes, strict=True):
        levels_K = outer.constant(f"{before}.levels", np.array([levels]))
        sides_CHW = outer.constant(f"{before}.chw", np.array(rest))
        shape = outer.node("Concat", [levels_K, batch, sides_CHW], f"{before}.shape", axis=0)
        initial.append(outer.node("ConstantOfShape", [shape], f"{before}.zero", value=zero))
        final.append(f"{after}.final")
    scan = helper.make_node("Scan", [*initial, "x"], [*final, "logits_TNL"], name="scan", body=body, num_scan_inputs=1)
    outer.nodes.append(scan)
    time_axis = outer.constant("time_axis", np.array([0]))
    outer.node("ReduceMean", ["logits_TNL", time_axis], "logits", keepdims=0)
    x = helper.make_tensor_value_info("x", element, ["T", *frame])
    logits = helper.make_tensor_value_info("logits", element, ["N", classes])
    return helper.make_graph(
        outer.nodes, "sequence", [x], [logits], [*target.constants.values(), *outer.constants.values()]
    )


def write_onnx(
    path: Path, model: SpikingNetwork, size: tuple[int, int], provenance: dict[str, Any], *, step: bool = False
) -> None:
    """Write a network with its provenance as an ONNX file, after checking that the file computes the same.

    Args:
        path: file to write.
        model: the network; it is folded first.
        size: H, W of the frames.
        provenance: stored in the file's metadata.
        step: write the graph of one time step, not that of a sequence.

    Raises:
        ValueError: the file computes something else than the network; nothing is written.
    """
    folded = fold(model).cpu().float()
    graph = onnx_graph(folded, size, step=step)
    helper.set_model_props(graph, metadata(provenance, step, "float32"))
    content = graph.SerializeToString()
    check(content, folded, size, step=step)
    write_atomic(path, append_digest(content))


def metadata(provenance: dict[str, Any], step: bool, weights: str) -> dict[str, str]:
    """Return the metadata of an ONNX file; `weights` is "float32" or "int8"."""
    return {KEY: json.dumps(provenance), "kind": "step" if step else "sequence", "weights": weights}


@torch.no_grad()
def check(content: bytes, folded: SpikingNetwork, size: tuple[int, int], *, step: bool) -> None:
    """Compare an ONNX file with its network on a few frames of noise.

    In float64, in which no spike flips by rounding, the logits of ONNX's reference evaluator must equal the network's
    to 1e-8. In fp32, ONNX Runtime may predict another class for at most MAX_DIFFERENT_PREDICTIONS of the samples.

    Raises:
        ValueError: they differ by more.
    """
    exact = copy.deepcopy(folded).double()
    for module in exact.modules():
        if isinstance(module, MLF):
            module.backend = "reference"
    noise = torch.Generator().manual_seed(0)
    x_TNCHW = torch.randn(3, 2, folded.in_channels, *size, generator=noise, dtype=torch.float64)
    double = onnx_graph(exact, size, step=step, dtype=np.float64)
    found = run_frames(ReferenceEvaluator(double).run, double, x_TNCHW.numpy(), step)
    error = np.abs(found - exact(x_TNCHW).numpy()).max()
    if not error <= 1e-8:  # true for NaN too
        raise ValueError(
            f"the ONNX graph's logits differ from the network's by {error:.2g} in float64, expected at most 1e-8; "
            "nothing is written"
        )
    x_TNCHW = torch.randn(3, 16, folded.in_channels, *size, generator=noise)
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    found = run_frames(session.run, onnx.load_from_string(content), x_TNCHW.numpy(), step)
    check_predictions(found, folded(x_TNCHW).numpy())


def check_predictions(found_NL: np.ndarray, expected_NL: np.ndarray) -> None:
    """Raise a ValueError if the predictions differ for more than MAX_DIFFERENT_PREDICTIONS of the samples."""
    different = (found_NL.argmax(1) != expected_NL.argmax(1)).mean()
    if different > MAX_DIFFERENT_PREDICTIONS:
        raise ValueError(
            f"ONNX Runtime predicts another class for {100 * different:.0f} % of the samples, expected at most "
            f"{100 * MAX_DIFFERENT_PREDICTIONS:.0f} %; nothing is written"
        )


def run_frames(run: Callable[..., Any], model: onnx.ModelProto, x_TNCHW: np.ndarray, step: bool) -> np.ndarray:
    """Run a graph on frames [T, N, C, H, W] and return the mean logits [N, classes].

    Args:
        run: `run` of an ONNX Runtime session or of ONNX's reference evaluator.
        model: the graph.
        x_TNCHW: the frames.
        step: True if the graph is that of one time step.
    """
    if not step:
        return run(None, {"x": x_TNCHW})[0]
    states, logits_sum = zero_states(model, x_TNCHW.shape[1]), np.zeros(1, x_TNCHW.dtype)
    for frame_NCHW in x_TNCHW:
        logits_NL, *after = run(None, {"frame": frame_NCHW, **states})
        states = dict(zip(states, after, strict=True))
        logits_sum = logits_sum + logits_NL
    return logits_sum / len(x_TNCHW)


def zero_states(model: onnx.ModelProto, samples: int) -> dict[str, np.ndarray]:
    """Return zero membranes for a step's graph, by the names of its inputs."""
    tensors = {value.name: value.type.tensor_type for value in model.graph.input[1:]}
    return {
        name: np.zeros(
            [d.dim_value or samples for d in tensor.shape.dim], helper.tensor_dtype_to_np_dtype(tensor.elem_type)
        )
        for name, tensor in tensors.items()
    }
