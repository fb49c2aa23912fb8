"""Time a recipe's network beside its convolutions alone, and measure the memory of a training step.

The convolutions alone are called the floor: they are the same for every kind of neuron, so that no implementation of
the neurons and norms can make the network faster than that.
"""

import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from multifire import datasets, ops
from multifire.config import RunConfig
from multifire.config.json_format import from_json, to_json
from multifire.nn import kept_for_backward, model_from_config
from multifire.training.optim import make_optimizer
from multifire.training.step import train_step
from multifire.utils.device import autocast, describe_machine, pick_device
from multifire.utils.memory import keep_freed_memory, peak_resident

KINDS = {
    "convolutions": ("mkldnn_convolution", "convolution_backward", "cudnn_convolution"),
    "neurons and norms": ("multifire",),
    "optimiser": ("_fused_sgd_",),
}
"""Kind of work -> parts of the names of its operators."""
WARM_UP_RUNS = 2


def bench(
    cfg: RunConfig, runs: int, on_run: Callable[[], None] | None = None, reference: bool = False
) -> dict[str, Any]:
    """Time a training step and an evaluation in turns with the convolutions alone; measure the memory of a step.

    A ratio is the median over pairs of neighbouring runs, which see the same load of the machine.

    Args:
        cfg: the network, its batch size and precision.
        runs: counted runs of each measurement.
        on_run: called after each turn.
        reference: time the reference backend in fp32 too.

    Returns:
        All figures as plain values.
    """
    device = pick_device(cfg.device)
    network = Network(cfg, device)
    timed: dict[str, Network | Floor] = {"network": network, "convolutions alone": Floor(network)}
    if reference:
        timed["reference in fp32"] = Network(replace(cfg, backend="reference", precision="fp32"), device)
    steps = alternate({name: each.step for name, each in timed.items()}, runs, device, on_run)
    evaluations = alternate({name: each.evaluate for name, each in timed.items()}, runs, device, on_run)
    shape = network.x_TNCHW.shape
    with autocast(device, cfg.precision):
        kept = kept_for_backward(network.model.train(), network.x_TNCHW)
    return {
        "recipe": cfg.recipe,
        "model": cfg.model.name,
        "width": cfg.model.width,
        "levels": cfg.model.levels,
        "precision": cfg.precision,
        "input [T, N, C, H, W]": list(shape),
        "batch_size": shape[1],
        "timings": {"training step": _compare(steps), "evaluation": _compare(evaluations)},
        "share_of_a_step": _fractions_of_a_step(network),
        "kept_bytes": kept.by_kind,
        "kept_bytes_per_neuron_and_step": kept.bytes_per_neuron_step,
        "peak_bytes": peak_in_own_process(cfg),
        "backends": ops.backends_used(),
        "machine": describe_machine(device),
    }


class Network:
    """A recipe's network, a batch for it (default: random images), and the two calls that are timed."""

    def __init__(self, cfg: RunConfig, device: torch.device, batch: tuple[Tensor, Tensor] | None = None):
        torch.manual_seed(cfg.seed)
        self.cfg = cfg
        self.model = model_from_config(cfg.model, cfg.backend).to(device)
        self.optimizer = make_optimizer(self.model, cfg.optim)
        self.x_TNCHW, self.y = _random_images(cfg, device) if batch is None else batch

    def step(self) -> None:
        """Do one training step."""
        self.model.train()
        train_step(self.model, self.optimizer, self.x_TNCHW, self.y, self.cfg)

    @torch.no_grad()
    def evaluate(self) -> None:
        """Do one forward pass in evaluation mode."""
        self.model.eval()
        with autocast(self.x_TNCHW.device, self.cfg.precision):
            self.model(self.x_TNCHW)


def _random_images(cfg: RunConfig, device: torch.device) -> tuple[Tensor, Tensor]:
    info = datasets.get_info(cfg.data.name)
    size = cfg.data.frame_size if info.events else info.size
    shape = (cfg.optim.batch_size, cfg.model.in_channels, size, size)
    steps = cfg.data.timesteps if info.events else 1  # an image is static
    x_TNCHW = torch.randn(steps, *shape, device=device).expand(cfg.data.timesteps, *shape)
    return x_TNCHW, torch.randint(0, cfg.model.num_classes, shape[:1], device=device)


class Floor:
    """The network's convolutions alone, each on a channels-last tensor of its own shape with T·N images."""

    def __init__(self, network: Network):
        dtype = torch.bfloat16 if network.cfg.precision == "bf16" else torch.float32
        layout: dict[str, Any] = {"dtype": dtype, "memory_format": torch.channels_last}
        self.calls: list[tuple[nn.Conv2d, Tensor, Tensor, Tensor]] = []
        for conv, shape, out_shape in _shapes_of_convolutions(network):
            device = conv.weight.device
            x = torch.randn(shape, device=device).to(**layout)
            x.requires_grad_(bool(self.calls))  # the first input is the image, which needs no gradient
            weight = conv.weight.detach().to(**layout).requires_grad_()
            self.calls.append((conv, x, weight, torch.randn(out_shape, device=device).to(**layout)))

    def step(self) -> None:
        """Do the forward and backward pass of every convolution."""
        outs = [F.conv2d(x, weight, None, _stride(conv), conv.padding) for conv, x, weight, _ in self.calls]
        torch.autograd.backward(outs, [grad for *_, grad in self.calls])
        for _, x, weight, _ in self.calls:
            x.grad = weight.grad = None

    @torch.no_grad()
    def evaluate(self) -> None:
        """Do the forward pass of every convolution."""
        for conv, x, weight, _ in self.calls:
            F.conv2d(x, weight, None, _stride(conv), conv.padding)


def _stride(conv: nn.Conv2d) -> tuple[int, ...]:
    """Return the stride to time: 1×1 convolutions run on picked pixels, see nn/conv.py."""
    return (1, 1) if conv.kernel_size == (1, 1) else conv.stride


def _shapes_of_convolutions(network: Network) -> list[tuple[nn.Conv2d, tuple[int, ...], tuple[int, ...]]]:
    """Return each convolution with the shapes of its input and output, T·N images each."""
    shapes = []
    samples = network.x_TNCHW.shape[0] * network.x_TNCHW.shape[1]

    def add_shapes(conv, inputs, out):
        size = out.shape[2:] if conv.kernel_size == (1, 1) else inputs[0].shape[2:]
        shapes.append((conv, (samples, inputs[0].shape[1], *size), (samples, *out.shape[1:])))

    with _hooked([m for m in network.model.modules() if isinstance(m, nn.Conv2d)], add_shapes):
        network.evaluate()
    return shapes


@contextmanager
def _hooked(modules: list[nn.Conv2d], hook: Callable) -> Iterator[None]:
    handles = [module.register_forward_hook(hook) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def alternate(
    calls: dict[str, Callable[[], None]], runs: int, device: torch.device, on_run: Callable[[], None] | None = None
) -> dict[str, list[float]]:
    """Time the calls in turns A B C A B C; return the seconds of each. `on_run` is called after each turn."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(-WARM_UP_RUNS, runs):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if number >= 0:
                seconds[name].append(time.perf_counter() - start)
        if on_run:
            on_run()
    return seconds


@dataclass(frozen=True)
class Timing:
    """Seconds of one call: median, fastest and slowest of all runs."""

    median: float
    fastest: float
    slowest: float
    runs: int


def _compare(seconds: dict[str, list[float]]) -> dict[str, dict[str, Any]]:
    """Return the timing of each call, and its ratio to neighbouring runs of the convolutions alone."""
    floor = seconds["convolutions alone"]
    return {
        name: vars(_timing(times)) | {"ratio": statistics.median(a / b for a, b in zip(times, floor, strict=True))}
        for name, times in seconds.items()
    }


def _timing(times: list[float]) -> Timing:
    return Timing(statistics.median(times), min(times), max(times), len(times))


def _fractions_of_a_step(network: Network) -> dict[str, float]:
    """Return the fraction of a training step's operator time for each kind of work.

    Neurons and norms of the reference backend are ordinary torch operators, so they are counted in "the rest".
    """
    with torch.profiler.profile() as profile:
        network.step()
    times = dict.fromkeys([*KINDS, "the rest"], 0.0)
    for event in profile.key_averages():
        kind = next((kind for kind, names in KINDS.items() if any(n in event.key for n in names)), "the rest")
        times[kind] += event.self_cpu_time_total + event.self_device_time_total
    return {kind: kind_time / sum(times.values()) for kind, kind_time in times.items() if kind_time}


def peak_in_own_process(cfg: RunConfig) -> int | None:
    """Return the peak memory in bytes of three training steps, without the interpreter's; None if it is unknown.

    The steps run in a process of their own, since the peak of this process includes earlier work.
    """
    done = subprocess.run(
        [sys.executable, "-m", "multifire.experiments.bench"],
        input=to_json(cfg),
        capture_output=True,
        text=True,
        check=False,
    )
    return int(done.stdout) if done.returncode == 0 else None


def _print_peak() -> None:
    cfg = from_json(sys.stdin.read(), "standard input")
    device = pick_device(cfg.device)
    square = torch.ones(64, 64, device=device)
    square.matmul(square)  # allocates the libraries' own buffers, which are not part of the step
    before = 0 if device.type == "cuda" else peak_resident()
    network = Network(cfg, device)
    for _ in range(3):
        network.step()
    print(torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_resident() - before)


if __name__ == "__main__":
    keep_freed_memory(after_first_step=True)
    _print_peak()
