"""A training step and an evaluation of DS-ResNet20 against the floor: its convolutions alone, forward and backward.

    python benchmarks/ops.py [--precision bf16] [--runs 9] [--reference] [--memory]

Runs of the network and of the floor alternate in one process; medians are printed. The floor's convolutions are those
of the network on channels-last tensors of the same shapes, weights and inputs requiring gradients (but not the image).
`--memory` prints, from a process of its own, the peak over the interpreter's baseline of one training step.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import multifire as mf
from multifire import ops

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def main() -> None:
    args = parse()
    torch.manual_seed(0)
    if args.memory_only:
        memory_of_a_step(args)
        return
    network = Network(args, "auto")
    timed = {"step": network.step, "step_floor": Floor(network).step}
    timed |= {"eval": network.evaluate, "eval_floor": Floor(network).evaluate}
    if args.reference:
        eager = argparse.Namespace(**{**vars(args), "precision": "fp32"})
        timed["step_reference_fp32"] = Network(eager, "reference").step
    seconds = alternate(timed, args.runs)
    print(
        f"{platform()}; {args.model} width {args.width} K {args.levels} T {args.timesteps} batch {args.batch}", end=" "
    )
    print(f"{args.size}x{args.size} {args.precision}, {args.runs} runs, backends {ops.backends_used()}")
    for name, times in seconds.items():
        median, low, high = statistics.median(times), min(times), max(times)
        per_image = [f"{value / args.batch * 1e3:.2f}" for value in (median, low, high)]
        print(f"{name:20} {per_image[0]:>8} ms/image  ({per_image[1]} .. {per_image[2]})")
    for name in ("step", "eval"):
        print(f"{name} / floor {ratio(seconds[name], seconds[name + '_floor']):.3f}")
    if args.reference:
        print(f"reference fp32 / step {ratio(seconds['step_reference_fp32'], seconds['step']):.2f}")
    if args.memory:
        # As it is, and with an allocator that gives every large block back: glibc's own keeps holes, which cost memory
        # and save page faults.
        for tuned in ({}, {"MALLOC_MMAP_THRESHOLD_": "1000000"}):
            command = [sys.executable, *sys.argv, "--memory-only"]
            subprocess.run(command, check=True, env={**os.environ, **tuned})  # noqa: S603 - this very script


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--precision", choices=DTYPES, default="bf16")
    parser.add_argument("--model", default="ds_resnet20")
    parser.add_argument("--runs", type=int, default=9)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--timesteps", type=int, default=4)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--levels", type=int, default=3)
    parser.add_argument("--channels", type=int, default=3)
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--reference", action="store_true", help="time the reference backend in eager fp32 too")
    parser.add_argument("--memory", action="store_true", help="measure the peak memory of a step too")
    parser.add_argument("--memory-only", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


class Network:
    """The network, one batch for it, and what is timed of it."""

    def __init__(self, args: argparse.Namespace, backend: str):
        self.dtype = DTYPES[args.precision]
        self.model = mf.build_model(
            args.model,
            args.channels,
            width=args.width,
            levels=args.levels,
            backend=backend,
        )
        self.optimizer = torch.optim.SGD(self.model.parameters(), 0.1, momentum=0.9, weight_decay=1e-4, fused=True)
        image = torch.randn(args.batch, args.channels, args.size, args.size)
        self.x = image.expand(args.timesteps, *image.shape)
        self.y = torch.randint(0, 10, (args.batch,))

    def _forward(self) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            return self.model(self.x)

    def step(self) -> None:
        self.model.train()
        loss = F.cross_entropy(self._forward().float(), self.y)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    @torch.no_grad()
    def evaluate(self) -> None:
        self.model.eval()
        self._forward()


class Floor:
    """The network's convolutions alone."""

    def __init__(self, network: Network):
        self.calls: list[tuple[nn.Conv2d, Tensor, Tensor, Tensor]] = []
        for conv, shape, out_shape in shapes_of_convolutions(network):
            first = not self.calls
            like = {"dtype": network.dtype, "memory_format": torch.channels_last}
            x = torch.randn(shape).to(**like).requires_grad_(not first)
            weight = conv.weight.detach().to(**like).requires_grad_()
            self.calls.append((conv, x, weight, torch.randn(out_shape).to(**like)))

    def _forward(self) -> list[Tensor]:
        return [F.conv2d(x, weight, None, conv.stride, conv.padding) for conv, x, weight, _ in self.calls]

    def step(self) -> None:
        torch.autograd.backward(self._forward(), [grad for *_, grad in self.calls])
        for _, x, weight, _ in self.calls:
            x.grad = weight.grad = None

    @torch.no_grad()
    def evaluate(self) -> None:
        for conv, x, weight, _ in self.calls:
            F.conv2d(x, weight, None, conv.stride, conv.padding)


def shapes_of_convolutions(network: Network) -> list[tuple[nn.Conv2d, torch.Size, torch.Size]]:
    """(convolution, shape of its input, of its output) of every call, at T·N samples even for a still image."""
    found = []
    samples = network.x.shape[0] * network.x.shape[1]

    def note(conv, inputs, out):
        found.append((conv, (samples, *inputs[0].shape[1:]), (samples, *out.shape[1:])))

    handles = [m.register_forward_hook(note) for m in network.model.modules() if isinstance(m, nn.Conv2d)]
    network.evaluate()
    for handle in handles:
        handle.remove()
    return found


def alternate(timed: dict[str, Callable[[], None]], runs: int) -> dict[str, list[float]]:
    for run in timed.values():
        run()
        run()
    seconds: dict[str, list[float]] = {name: [] for name in timed}
    for _ in range(runs):
        for name, run in timed.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def ratio(times: list[float], others: list[float]) -> float:
    """Median of the ratios of neighbouring runs, which share whatever else the machine was doing."""
    return statistics.median(a / b for a, b in zip(times, others, strict=True))


def memory_of_a_step(args: argparse.Namespace) -> None:
    """Peak of the resident memory over that of the interpreter with torch loaded, over three steps."""
    torch.ones(64, 64) @ torch.ones(64, 64)  # the libraries' own buffers belong to the baseline
    before = peak_bytes()
    network = Network(args, "auto")
    for _ in range(3):
        network.step()
    peak = peak_bytes() - before
    allocator = "large blocks given back" if "MALLOC_MMAP_THRESHOLD_" in os.environ else "default allocator"
    print(f"peak over the baseline {peak / 1e6:.0f} MB, {peak / args.batch / 1e6:.1f} MB/image ({allocator})")


def peak_bytes() -> int:
    """VmHWM: unlike ru_maxrss it does not start from the parent's peak."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) * 1024


def platform() -> str:
    isa = ops.cpu.isa() if ops.cpu.is_built() else "none"
    return f"torch {torch.__version__}, {torch.get_num_threads()} threads, kernel {isa}"


if __name__ == "__main__":
    main()
