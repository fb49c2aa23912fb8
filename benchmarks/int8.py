#!/usr/bin/env python3
"""Compare the time of int8 evaluation with that of floating-point evaluation, in turns in one process.

usage: python -m benchmarks.int8 [--runs N] [--batches 64 1] [--all-up-to N] [--out FOLDER]

The network is a DS-ResNet20 of width 64 with random weights; the statistics of its norms are set so that every layer
fires. The input is random static images [4, N, 3, 32, 32]. The network runs in five ways:

    reference  plain PyTorch, fp32, eager
    fp32       multifire's CPU kernel
    bf16       multifire's CPU kernel with convolutions in bf16; slow on processors without bf16 instructions
    folded     the network of mf.export.fold, fp32
    int8       the network that mf.load_int8 reads from the exported file

Then single convolutions with uint8 input are timed with oneDNN (through torch) and with two operators of ONNX Runtime:
ConvInteger returns the integer sums that firing needs; QLinearConv rounds them to uint8. The integer sums are checked
against a convolution in float64. Writes int8.csv (every run) and int8.md (medians, machine, versions).
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
import torch.nn.functional as F
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

import multifire as mf
from benchmarks.tables import markdown, write_csv
from multifire.config import ModelConfig
from multifire.export.int8 import LARGEST_ACTIVATION, Int8Conv2d, Int8Network, quantise_network, save_int8
from multifire.export.provenance import PROVENANCE_VERSION
from multifire.nn import model_from_config
from multifire.utils.device import autocast, describe_machine
from multifire.utils.files import write_atomic
from multifire.utils.tensor_files import write_tensors

RESULTS = Path(__file__).parent / "results"
MODEL = ModelConfig(name="ds_resnet20", width=64)
TIMESTEPS, SIZE = 4, 32
CONVOLUTIONS = ((64, 64, 32, 1), (128, 128, 16, 1), (256, 256, 8, 1), (64, 128, 32, 2))
"""Input channels, output channels, H = W, stride of the timed convolutions; their kernels are 3 × 3."""
IMAGES = 16
"""Batch size of the timed convolutions."""
COLUMNS = ("what", "way", "batch", "run", "seconds")


def random_network() -> mf.SpikingNetwork:
    """Return a network with random weights; its norms hold the statistics of one batch, so that every layer fires."""
    torch.manual_seed(0)
    net = model_from_config(MODEL, backend="cpu").train()
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, mf.nn.TdBatchNorm2d):
                module.momentum = 1.0
        net(torch.randn(1, 8, MODEL.in_channels, SIZE, SIZE).expand(TIMESTEPS, -1, -1, -1, -1))
    return net.eval()


def exported(net: mf.SpikingNetwork, folder: Path) -> tuple[Int8Network, float]:
    """Export the network to int8 and load it; also return the file's size relative to that of the float32 weights."""
    provenance: dict[str, Any] = dict.fromkeys(("recipe", "config", "data", "accuracy", "checkpoint", "versions"))
    provenance |= {
        "provenance": PROVENANCE_VERSION,
        "recipe": "random",
        "config": {"model": vars(MODEL)},
        "accuracy": [],
    }
    provenance |= {"data": {"name": "none", "about": "random"}, "versions": {}}
    provenance |= {"checkpoint": {"file": "none", "epochs": 0, "sha256": ""}}
    save_int8(folder / "int8.safetensors", quantise_network(net, MODEL, counts=False), provenance)
    write_tensors(folder / "float.safetensors", net.state_dict(), {})
    sizes = [(folder / f"{kind}.safetensors").stat().st_size for kind in ("int8", "float")]
    return mf.load_int8(folder / "int8.safetensors"), sizes[0] / sizes[1]


def networks(net: mf.SpikingNetwork, int8: Int8Network) -> dict[str, Callable[[Tensor], Any]]:
    """Return the ways to run the network, by name."""
    reference = model_from_config(MODEL, backend="reference").eval()
    reference.load_state_dict(net.state_dict())

    def bf16(x: Tensor) -> Tensor:
        with autocast(x.device, "bf16"):
            return net(x)

    return {"reference": reference, "fp32": net, "bf16": bf16, "folded": mf.export.fold(net), "int8": int8}


def convolutions(in_channels: int, out_channels: int, size: int, stride: int) -> dict[str, Callable[[], Any]]:
    """Return the ways to compute one convolution of the same uint8 images, by name.

    The integer sums of oneDNN and ConvInteger are compared with the exact ones first.
    """
    x = torch.randint(0, 13, (IMAGES, in_channels, size, size), dtype=torch.uint8)
    x_channels_last = x.contiguous(memory_format=torch.channels_last)
    conv = Int8Conv2d(in_channels, out_channels, 3, stride)
    conv.weight.random_(-127, 128)
    x_and_weight = x_channels_last.float(), conv.weight.float().contiguous(memory_format=torch.channels_last)
    conv_integer, qlinear_conv = (
        onnx_convolution(operator, conv.weight, stride) for operator in ("ConvInteger", "QLinearConv")
    )
    for value in (12, LARGEST_ACTIVATION):
        probe = torch.full((1, in_channels, size, size), value, dtype=torch.uint8)
        exact = F.conv2d(probe.double(), conv.weight.double(), stride=stride, padding=1)
        assert torch.equal(conv(probe).double(), exact)
        assert np.array_equal(conv_integer(probe.numpy()), exact.numpy())
    images = x.numpy()
    return {
        "fp32, oneDNN": lambda: F.conv2d(*x_and_weight, stride=stride, padding=1),
        "int8, oneDNN": lambda: conv(x_channels_last),
        "int8, ConvInteger": lambda: conv_integer(images),
        "int8, QLinearConv": lambda: qlinear_conv(images),
    }


def onnx_convolution(operator: str, weight: Tensor, stride: int) -> Callable[[np.ndarray], np.ndarray]:
    """Return a function that runs one ONNX operator in ONNX Runtime, with scales of 1 and zero points of 0."""
    out_channels = len(weight)
    constants = {"w": weight.numpy()}
    inputs, output_type = ["x", "w"], TensorProto.INT32
    if operator == "QLinearConv":
        constants |= {"xs": np.float32(1), "xz": np.uint8(0), "ys": np.float32(1), "yz": np.uint8(0)}
        constants |= {"ws": np.ones(out_channels, np.float32), "wz": np.zeros(out_channels, np.int8)}
        inputs, output_type = ["x", "xs", "xz", "w", "ws", "wz", "ys", "yz"], TensorProto.UINT8
    node = helper.make_node(operator, inputs, ["y"], strides=[stride, stride], pads=[1, 1, 1, 1])
    x, y = (
        helper.make_tensor_value_info(name, type, [None] * 4)
        for name, type in (("x", TensorProto.UINT8), ("y", output_type))
    )
    weights = [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()]
    graph = helper.make_graph([node], operator, [x], [y], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return lambda images: np.asarray(session.run(None, {"x": images})[0])


def in_turns(what: str, batch: int, ways: dict[str, Callable[[], Any]], runs: int) -> list[dict[str, Any]]:
    """Time `runs` calls of each way in turns, after one call of each that is not timed; return a row for each run."""
    rows = []
    for run in range(-1, runs):
        for way, call in ways.items():
            start = time.perf_counter()
            call()
            seconds = time.perf_counter() - start
            if run >= 0:
                rows.append({"what": what, "way": way, "batch": batch, "run": run, "seconds": seconds})
        print(f"{what}, batch {batch}: run {run + 1} of {runs}", flush=True)
    return rows


def tables(rows: list[dict[str, Any]]) -> str:
    """Return a table for each network or convolution and batch size.

    It shows the time per image of each way, and the median of its ratios to the neighbouring runs of int8.
    """
    text = ""
    for what, batch in dict.fromkeys((row["what"], row["batch"]) for row in rows):
        times = {
            way: [
                row["seconds"] / batch for row in rows if (row["what"], row["batch"], row["way"]) == (what, batch, way)
            ]
            for way in dict.fromkeys(row["way"] for row in rows if (row["what"], row["batch"]) == (what, batch))
        }
        int8_times = times.get("int8") or times["int8, oneDNN"]
        lines = []
        for way, seconds in times.items():
            median, low, high = (1e3 * f(seconds) for f in (statistics.median, min, max))
            ratio = statistics.median(own / int8 for own, int8 in zip(seconds, int8_times, strict=True))
            lines.append((way, f"{median:.3g} ({low:.3g} to {high:.3g})", f"{ratio:.2f}"))
        text += f"\n## {what}, batch {batch}\n\n"
        text += markdown(("", f"ms per image, median of {len(int8_times)} (range)", "× int8"), lines)
    return text


def main() -> None:
    parser = argparse.ArgumentParser(usage=__doc__.split("usage: ")[1].splitlines()[0] if __doc__ else None)
    parser.add_argument("--runs", type=int, default=7, help="timed runs of each way (default: 7)")
    parser.add_argument("--batches", type=int, nargs="+", default=[64, 1], help="batch sizes (default: 64 1)")
    parser.add_argument(
        "--all-up-to", type=int, default=64, help="above this batch size only reference, fp32 and int8 are timed"
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for int8.csv and int8.md")
    args = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        net = random_network()
        int8, relative_size = exported(net, Path(folder))
        for batch in args.batches:
            x = torch.randn(1, batch, MODEL.in_channels, SIZE, SIZE).expand(TIMESTEPS, -1, -1, -1, -1)
            ways = {way: (lambda f=f, x=x: f(x)) for way, f in networks(net, int8).items()}
            if batch > args.all_up_to:
                ways = {way: ways[way] for way in ("reference", "fp32", "int8")}
            rows += in_turns("DS-ResNet20, width 64, T = 4", batch, ways, args.runs)
        for shape in CONVOLUTIONS:
            what = "Convolution 3 × 3, {} to {} channels, {} × {}, stride {}".format(*shape[:3], *shape[2:])
            rows += in_turns(what, IMAGES, convolutions(*shape), args.runs)
    write_csv(args.out / "int8.csv", COLUMNS, rows)
    machine = describe_machine(torch.device("cpu"))
    text = (
        "# Evaluation in integers\n\n"
        "Written by `python -m benchmarks.int8`. All ways run in turns in one process, after one warm-up call each. "
        f"{machine['processor']}, {machine['threads']} threads, CPU kernel {mf.ops.cpu.isa()}; "
        f"torch {machine['torch']}, ONNX Runtime {onnxruntime.__version__}, multifire {machine['multifire']}.\n"
        f"The int8 file has {relative_size:.3f} × the size of a file with the float32 weights.\n"
    )
    write_atomic(args.out / "int8.md", (text + tables(rows)).encode())
    print((args.out / "int8.md").read_text())


if __name__ == "__main__":
    main()
