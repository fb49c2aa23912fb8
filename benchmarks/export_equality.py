"""Compare exported networks with the evaluated network of a run in fp32.

    python -m benchmarks.export_equality RUN [--split train] [--limit N]

Another order of summation changes the rounding of a membrane potential. A neuron close to its threshold may then fire
or not, which changes further spikes in later layers. To show the size of this effect, the evaluated network is also
compared with itself, computed in two other ways:

- other memory layout: the input and the weights of the convolutions are contiguous instead of channels-last. oneDNN may
  still add in the same order.
- oneDNN off: torch's own convolutions replace those of oneDNN.

The int8 network is listed for comparison. It has rounded weights, so its differences have another cause.
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
    parser.add_argument("run", type=Path, help="folder of a training run")
    parser.add_argument("--split", choices=("test", "train"), default="test", help="split to evaluate (default: test)")
    parser.add_argument("--limit", type=int, default=10_000, help="maximum number of samples (default: 10000)")
    args = parser.parse_args()
    run = RunFolder(args.run)
    model, cfg = load_model(run.checkpoint(run.reported_checkpoint()))
    data = datasets.load(cfg.data.name, cfg.data.root, cfg.data)
    samples = data.test if args.split == "test" else data.train
    # A program of torch.export accepts one batch size only, so the batch size divides the number of samples.
    batch_size = math.gcd(min(len(samples), args.limit), 50)
    batches = make_batches(
        samples, data.info, cfg.data, batch_size=batch_size, device=torch.device("cpu"), shuffle=False
    )
    folded = fold(model)
    x = next(iter(batches.epoch(0)))[0]
    session = onnxruntime.InferenceSession(onnx_graph(folded, (x.shape[3], x.shape[4])).SerializeToString())
    program = torch.export.export(model, (x,)).module()
    folded_program = torch.export.export(
        fold(load_model(run.checkpoint(run.reported_checkpoint()), "reference")[0]), (x,)
    ).module()

    def run_contiguous(x: Tensor) -> Tensor:
        return contiguous_model(x.contiguous())

    def run_without_onednn(x: Tensor) -> Tensor:
        with torch.backends.mkldnn.flags(enabled=False):
            return model(x)

    contiguous_model = load_model(run.checkpoint(run.reported_checkpoint()))[0]
    for module in contiguous_model.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.weight.data = module.weight.data.contiguous()
    networks: dict[str, Callable[[Tensor], Tensor]] = {
        "evaluation": model,
        "evaluation, other memory layout": run_contiguous,
        "evaluation, oneDNN off": run_without_onednn,
        "torch.export": program,
        "folded": folded,
        "torch.export, folded, reference backend": folded_program,
        "ONNX Runtime": lambda x: torch.from_numpy(session.run(None, {"x": x.numpy()})[0]),
        "int8": quantise_network(model, cfg.model, data.info.events),
    }
    outputs, labels = {name: [] for name in networks}, []
    with torch.no_grad():
        for x, y in itertools.islice(batches.epoch(0), args.limit // batch_size):
            labels.append(y)
            for name, network in networks.items():
                outputs[name].append(network(x))
    y, expected = torch.cat(labels), torch.cat(outputs["evaluation"])
    print(f"{cfg.recipe}, {len(y)} {args.split} samples; {describe_machine(torch.device('cpu'))}")
    for name, parts in outputs.items():
        logits = torch.cat(parts)
        print(f"{name}: same prediction {percent(logits.argmax(1) == expected.argmax(1))}, "
              f"samples with other logits {percent((logits != expected).any(1))}, "
              f"largest difference of a logit {(logits - expected).abs().max():.3f}, "
              f"accuracy {percent(logits.argmax(1) == y)}")  # fmt: skip


def percent(condition: Tensor) -> str:
    """Return the percentage of elements that are True, as text."""
    return f"{100 * condition.double().mean():.2f} %"


if __name__ == "__main__":
    main()
