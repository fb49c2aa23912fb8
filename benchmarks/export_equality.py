"""How far exported networks are from the evaluation network in fp32, beside how far it is from itself.

    python -m benchmarks.export_equality RUN [--split train] [--limit N]

A spike on its threshold may fall either way when sums are taken in another order, and others after it. There are two
floors: the same network with its input and its convolutions' weights in another memory layout (rows before channels),
for which oneDNN may still take every sum in the same order, and with torch's own convolutions instead of oneDNN's.
int8 is another network, with rounded weights, and stands beside them for comparison.
"""

import argparse
import itertools
import math
from collections.abc import Callable
from pathlib import Path

import onnxruntime
import torch
from torch import Tensor

from multifire import datasets
from multifire.datasets.loader import make_batches
from multifire.export import fold, quantise_network
from multifire.export.onnx import onnx_graph
from multifire.training.checkpoint import load_model
from multifire.training.run_folder import RunFolder
from multifire.utils.device import describe_machine


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--split", choices=("test", "train"), default="test")
    parser.add_argument("--limit", type=int, default=10_000, help="samples")
    args = parser.parse_args()
    run = RunFolder(args.run)
    model, cfg = load_model(run.checkpoint(run.headline()))
    data = datasets.load(cfg.data.name, cfg.data.root, cfg.data)
    samples = data.test if args.split == "test" else data.train
    size = math.gcd(min(len(samples), args.limit), 50)  # whole batches: torch.export's programs take one size
    batches = make_batches(samples, data.info, cfg.data, batch_size=size, device=torch.device("cpu"), shuffle=False)
    folded = fold(model)
    x = next(iter(batches.epoch(0)))[0]
    session = onnxruntime.InferenceSession(onnx_graph(folded, (x.shape[3], x.shape[4])).SerializeToString())
    program = torch.export.export(model, (x,)).module()
    folded_program = torch.export.export(
        fold(load_model(run.checkpoint(run.headline()), "reference")[0]), (x,)
    ).module()

    def other_layout(x: Tensor) -> Tensor:
        return rows(x.contiguous())

    def other_convolutions(x: Tensor) -> Tensor:
        with torch.backends.mkldnn.flags(enabled=False):
            return model(x)

    rows = load_model(run.checkpoint(run.headline()))[0]
    for module in rows.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.weight.data = module.weight.data.contiguous()
    networks: dict[str, Callable[[Tensor], Tensor]] = {
        "evaluation": model,
        "evaluation, other memory layout": other_layout,
        "evaluation, oneDNN off": other_convolutions,
        "torch.export": program,
        "folded": folded,
        "torch.export, folded, reference backend": folded_program,
        "ONNX Runtime": lambda x: torch.from_numpy(session.run(None, {"x": x.numpy()})[0]),
        "int8": quantise_network(model, cfg.model, data.info.events),
    }
    outputs, labels = {name: [] for name in networks}, []
    with torch.no_grad():
        for x, y in itertools.islice(batches.epoch(0), args.limit // size):
            labels.append(y)
            for name, network in networks.items():
                outputs[name].append(network(x))
    truth, first = torch.cat(labels), torch.cat(outputs["evaluation"])
    print(f"{cfg.recipe}, {len(truth)} {args.split} samples; {describe_machine(torch.device('cpu'))}")
    for name, found in outputs.items():
        mine = torch.cat(found)
        print(f"{name}: same prediction {percent(mine.argmax(1) == first.argmax(1))}, "
              f"other logits {percent((mine != first).any(1))}, furthest {(mine - first).abs().max():.3f}, "
              f"accuracy {percent(mine.argmax(1) == truth)}")  # fmt: skip


def percent(where: Tensor) -> str:
    return f"{100 * where.double().mean():.2f} %"


if __name__ == "__main__":
    main()
