"""Time a recipe's network beside its convolutions alone, and measure the memory of a training step.

The convolutions alone are called the floor: they are the same for every kind of neuron, so that no implementation of
the neurons and norms can make the network faster than that. On a GPU all of it runs as CUDA graphs, as in
`multifire train`.
"""

import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
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
from multifire.training.captured import TrainingStep, logits_function
from multifire.training.optim import make_optimizer
from multifire.utils.cuda_graph import WARM_UP_CALLS, CapturedFunction
from multifire.utils.device import autocast, describe_machine, pick_device
from multifire.utils.memory import keep_freed_memory, peak_resident

KINDS = {
    "convolutions": ("mkldnn_convolution", "convolution_backward", "cudnn_convolution"),
    "neurons and norms": ("multifire",),
    "optimiser": ("_fused_sgd_",),
}
"""Kind of work -> parts of the names of its operators."""
GPU_KINDS = {
    "convolutions": ("cudnn", "fprop", "dgrad", "wgrad", "conv", "gemm", "cutlass", "nchw", "nhwc"),
    "optimiser": ("fusedsgd",),
}
"""Kind of work -> parts of the names of its kernels on a GPU, in lower case."""
TRITON_KERNELS = ("measure", "forward", "backward", "coefficients_of_sums", "finish", "pack", "unpack")
"""Names of the kernels of neurons and norms; see ops/triton_kernels.py."""
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
        reference_cfg = replace(cfg, backend="reference", precision="fp32")
        timed["reference in fp32"] = Network(reference_cfg, device, captured=False)
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
    """A recipe's network, a batch for it, and the two calls that are timed: those of `multifire train`."""

    def __init__(
        self,
        cfg: RunConfig,
        device: torch.device,
        batch: tuple[Tensor, Tensor] | None = None,
        captured: bool | None = None,
    ):
        """Build the network.

        Args:
            cfg: network, precision and optimiser.
            device: device of the network.
            batch: x [T, N, C, H, W] and labels [N] on the device (default: random images).
            captured: run the calls as CUDA graphs (default: on a GPU).
        """
        cfg, _ = datasets.describe_run(cfg)
        torch.manual_seed(cfg.seed)
        self.cfg = cfg
        self.captured = device.type == "cuda" if captured is None else captured
        self.model = model_from_config(cfg.model, cfg.backend).to(device)
        self.optimizer = make_optimizer(self.model, cfg.optim)
        self.x_TNCHW, self.y = _random_images(cfg, device) if batch is None else batch
        self._do_step = TrainingStep(self.model, self.optimizer, cfg, captured=self.captured)
        self._logits = logits_function(self.model, cfg.precision, captured=self.captured)

    def step(self) -> Tensor:
        """Do one training step; return the sum of the losses."""
        self.model.train()
        return self._do_step(self.x_TNCHW, self.y).totals[0]

    @torch.no_grad()
    def evaluate(self) -> Tensor:
        """Do one forward pass in evaluation mode; return the logits [T, N, L]."""
        self.model.eval()
        return self._logits(self.x_TNCHW)


def _random_images(cfg: RunConfig, device: torch.device) -> tuple[Tensor, Tensor]:
    info = datasets.describe(cfg.data)
    shape = (cfg.optim.batch_size, cfg.model.in_channels, *datasets.input_size(cfg.data, info))
    steps = cfg.data.timesteps if info.events else 1  # an image is static
    x_TNCHW = torch.randn(steps, *shape, device=device).expand(cfg.data.timesteps, *shape)
    return x_TNCHW, torch.randint(0, cfg.model.num_classes, shape[:1], device=device)


class Floor:
    """The network's convolutions alone, each on a channels-last tensor of its own shape with T·N images."""

    def __init__(self, network: Network):
        """Copy the convolutions of the network; their calls are CUDA graphs if those of the network are."""
        dtype = torch.bfloat16 if network.cfg.precision == "bf16" else torch.float32
        layout: dict[str, Any] = {"dtype": dtype, "memory_format": torch.channels_last}
        self.calls: list[tuple[nn.Conv2d, Tensor, Tensor, Tensor]] = []
        for conv, shape, out_shape in _shapes_of_convolutions(network):
            device = conv.weight.device
            x = torch.randn(shape, device=device).to(**layout)
            x.requires_grad_(bool(self.calls))  # the first input is the image, which needs no gradient
            weight = conv.weight.detach().to(**layout).requires_grad_()
            self.calls.append((conv, x, weight, torch.randn(out_shape, device=device).to(**layout)))
        self._start = torch.zeros(1, device=network.y.device)  # a captured function has an input
        self._step, self._evaluate = self._both_passes, self._forward_pass
        if network.captured:
            self._step = CapturedFunction(self._both_passes, "convolutions")
            self._evaluate = CapturedFunction(self._forward_pass, "convolutions")

    def step(self) -> None:
        """Do the forward and backward pass of every convolution."""
        self._step(self._start)

    @torch.no_grad()
    def evaluate(self) -> None:
        """Do the forward pass of every convolution."""
        self._evaluate(self._start)

    def _both_passes(self, _start: Tensor) -> None:
        outs = [F.conv2d(x, weight, None, _stride(conv), conv.padding) for conv, x, weight, _ in self.calls]
        torch.autograd.backward(outs, [grad for *_, grad in self.calls])
        for _, x, weight, _ in self.calls:
            x.grad = weight.grad = None

    def _forward_pass(self, _start: Tensor) -> None:
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

    convolutions = [m for m in network.model.modules() if isinstance(m, nn.Conv2d)]
    with torch.no_grad(), autocast(network.y.device, network.cfg.precision), _hooked(convolutions, add_shapes):
        network.model.eval()(network.x_TNCHW)
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
    calls: dict[str, Callable[[], Any]], runs: int, device: torch.device, on_run: Callable[[], None] | None = None
) -> dict[str, list[float]]:
    """Time the calls in turns A B C A B C; return the seconds of each. `on_run` is called after each turn."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    if device.type == "cuda":
        capture_graphs(calls.values())
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


def capture_graphs(calls: Iterable[Callable[[], Any]]) -> None:
    """Call each function so often that a `CapturedFunction` in it has captured its graph."""
    for call in calls:
        for _ in range(WARM_UP_CALLS + 1):
            call()


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
    device = network.y.device
    with torch.profiler.profile() as profile:
        network.step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    times = dict.fromkeys([*KINDS, "the rest"], 0.0)
    for name, seconds in operator_times(profile, device):
        times[kind_of_work(name, device)] += seconds
    return {kind: kind_time / sum(times.values()) for kind, kind_time in times.items() if kind_time}


def operator_times(profile: torch.profiler.profile, device: torch.device) -> list[tuple[str, float]]:
    """Return the name and the seconds of each operator, on a GPU of each kernel."""
    events = profile.key_averages()
    if device.type == "cuda":
        kernels = [event for event in events if event.device_type == torch.autograd.DeviceType.CUDA]
        return [(event.key, 1e-6 * event.self_device_time_total) for event in kernels]
    return [(event.key, 1e-6 * event.self_cpu_time_total) for event in events]


def kind_of_work(name: str, device: torch.device) -> str:
    """Return the kind of work, see `KINDS`, of an operator or, on a GPU, of a kernel."""
    if device.type == "cuda":
        if name in TRITON_KERNELS:
            return "neurons and norms"
        name, kinds = name.lower(), GPU_KINDS
    else:
        kinds = KINDS
    return next((kind for kind, parts in kinds.items() if any(part in name for part in parts)), "the rest")


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
    for _ in range(WARM_UP_CALLS + 2 if network.captured else 3):
        network.step()
    print(torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_resident() - before)


if __name__ == "__main__":
    keep_freed_memory(after_first_step=True)
    _print_peak()
