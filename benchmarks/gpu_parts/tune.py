"""Part 7, tune: time the kernels with other choices of tile, warps and registers, and print a `TUNED` entry.

`multifire bench` has no option for this: the choices belong to a kind of GPU, not to a recipe.
"""

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor, nn

from benchmarks.gpu_parts.clock import synchronize, time_calls
from benchmarks.gpu_parts.setting import Item, Setting
from multifire import ops
from multifire.experiments.bench import Network
from multifire.nn.block import ConvFire, is_static_input
from multifire.ops.triton import CHOICES, TUNED, Choice
from multifire.utils.device import autocast

COLUMNS = ("kernel", "tile", "warps", "registers", "programs", "recipe", "shape", "layers", "seconds", "is_default")
RECIPES = (("cifar10", 128), ("dvs-gesture", None), ("cifar10-dvs", None))
KERNELS = ("measure", "forward", "backward", "finish", "pack")
CALLS = 5
CANDIDATES: Mapping[str, tuple[Choice, ...]] = {
    "measure": (Choice(512, 4, programs=8), Choice(1024, 4, programs=8), Choice(1024, 8), Choice(2048, 8, programs=4),
                Choice(2048, 16)),
    "forward": (Choice(256, 4), Choice(512, 8), Choice(1024, 4), Choice(1024, 8), Choice(2048, 8)),
    "backward": (Choice(512, 4, 128, 4), Choice(512, 8), Choice(512, 4, 160, 3), Choice(1024, 8, 96),
                 Choice(256, 2, 128, 8)),
    "finish": (Choice(512, 4), Choice(1024, 8), Choice(2048, 4), Choice(2048, 8), Choice(4096, 8)),
    "pack": (Choice(512, 2), Choice(512, 4), Choice(1024, 8), Choice(2048, 8), Choice(4096, 8)),
}  # fmt: skip
"""Choices to compare with the default, which is timed first; all kernels change at once."""


class Shape(NamedTuple):
    """The input of a layer of neurons."""

    size: tuple[int, ...]
    """[T, N, C, H, W] of the spikes."""
    is_static: bool
    has_sum: bool
    """True if a block's shortcut is added to the spikes."""


def items(setting: Setting) -> list[Item]:
    """One item for each set of choices and recipe; the last one prints the best choices."""
    sets = [dict(CHOICES), *(dict(zip(KERNELS, row, strict=True)) for row in zip(*CANDIDATES.values(), strict=True))]
    if not setting.on_gpu:
        sets = sets[:2]
    seconds: dict[tuple[str, Choice], list[float]] = {}
    found = [
        Item(f"{recipe}, choices {number}", 15 if setting.on_gpu else 5,
             partial(run, recipe, batch, choices, seconds, setting))
        for recipe, batch in (RECIPES if setting.on_gpu else RECIPES[:1])
        for number, choices in enumerate(sets)
    ]  # fmt: skip
    return [*found, Item("the best choices", 0.1, partial(print_best, seconds, setting))]


def run(
    recipe: str,
    batch: int | None,
    choices: Mapping[str, Choice],
    seconds: dict[tuple[str, Choice], list[float]],
    setting: Setting,
) -> Iterator[dict[str, Any]]:
    """Time every kernel with a choice for each on all shapes of a recipe; add the sums over its layers to `seconds`."""
    case = setting.case(recipe, batch) if setting.on_gpu else setting.case(recipe, batch).with_(width=1, batch_size=1)
    shapes = _shapes(Network(case.cfg, setting.device, setting.batch(case), captured=False))
    if not setting.on_gpu:
        shapes = Counter({Shape((2, 1, 2, 2, 3), False, True): 1})  # the interpreter is slow
    totals: dict[str, float] = dict.fromkeys(KERNELS, 0.0)
    for shape, layers in shapes.items():
        with patch.dict(CHOICES, choices), patch.dict(TUNED, clear=True):
            found = _time_kernels(shape, setting)
        for kernel, taken in found.items():
            choice = choices[kernel]
            totals[kernel] += layers * taken
            yield {
                "kernel": kernel, **choice._asdict(), "recipe": recipe, "shape": " ".join(map(str, shape.size)),
                "layers": layers, "seconds": taken, "is_default": choice == CHOICES[kernel],
            }  # fmt: skip
    for kernel, total in totals.items():
        seconds.setdefault((kernel, choices[kernel]), []).append(total)


def print_best(seconds: dict[tuple[str, Choice], list[float]], setting: Setting) -> list[dict[str, Any]]:
    """Print the choices with the lowest geometric mean over recipes, as an entry of `TUNED` in ops/triton.py."""
    complete = max((len(values) for values in seconds.values()), default=0)
    best = {}
    for kernel in KERNELS:
        means = {
            choice: math.exp(sum(map(math.log, values)) / len(values))
            for (name, choice), values in seconds.items()
            if name == kernel and len(values) == complete and all(values)
        }
        if means:
            best[kernel] = min(means, key=means.__getitem__)
            default = means.get(CHOICES[kernel], math.nan)
            print(f"{kernel}: {best[kernel]} takes {means[best[kernel]] / default:.3f} of the default's time")
    changed = {kernel: choice for kernel, choice in best.items() if choice != CHOICES[kernel]}
    capability = torch.cuda.get_device_capability(setting.device) if setting.on_gpu else (0, 0)
    lines = "".join(f'        "{kernel}": {_as_code(choice)},\n' for kernel, choice in changed.items())
    print(f"TUNED entry of ops/triton.py:\n    {capability}: {{\n{lines}    }},", flush=True)
    return []


def _as_code(choice: Choice) -> str:
    registers = "" if choice.registers is None else f", registers={choice.registers}"
    programs = "" if choice.programs == Choice(1, 1).programs else f", programs={choice.programs}"
    return f"Choice({choice.tile}, {choice.warps}{registers}{programs})"


@torch.no_grad()
def _shapes(network: Network) -> Counter[Shape]:
    """Return the shapes of a network's layers, with the number of layers of each."""
    found: Counter[Shape] = Counter()

    def add(_module: nn.Module, inputs: tuple[Tensor], sums: dict[str, Any], spikes: Tensor) -> None:
        has_sum = sums.get("add_after") is not None
        found[Shape(tuple(spikes.shape), is_static_input(inputs[0]), has_sum)] += 1

    handles = [
        module.register_forward_hook(add, with_kwargs=True)
        for module in network.model.modules()
        if isinstance(module, ConvFire)
    ]
    with autocast(network.y.device, network.cfg.precision):
        network.model.eval()(network.x_TNCHW)
    for handle in handles:
        handle.remove()
    return found


def _time_kernels(shape: Shape, setting: Setting) -> dict[str, float]:
    """Return the seconds of each kernel on a layer's shape; the interpreter's are those of all kernels together."""
    call = _layer(shape, setting)
    call()
    if not setting.on_gpu:
        return dict.fromkeys(KERNELS, time_calls(call, setting)[0])
    call()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(CALLS):
            call()
        synchronize(setting)
    times = {event.key: 1e-6 * event.self_device_time_total / CALLS for event in profile.key_averages()}
    return {name: times[name] + times.get(f"un{name}", 0.0) for name in KERNELS if name in times}


def _layer(shape: Shape, setting: Setting) -> Any:
    """Return a function that calls the fused op forward and backward, and packs and unpacks the spikes."""
    timesteps, _, channels, *_ = shape.size

    def random(steps: int) -> Tensor:
        T, N, C, H, W = steps, *shape.size[1:]
        x = torch.randn(T, N, H, W, C, device=setting.device, dtype=torch.bfloat16)
        return x.permute(0, 1, 4, 2, 3)

    x = random(1 if shape.is_static else timesteps).requires_grad_()
    grad, after = random(timesteps), random(timesteps).round() if shape.has_sum else None
    weight, bias = (f(channels, device=setting.device).requires_grad_() for f in (torch.ones, torch.zeros))
    running = torch.zeros(channels, device=setting.device), torch.ones(channels, device=setting.device)

    def call() -> None:
        spikes, _ = ops.tdbn_mlf(
            x, weight, bias, *running, training=True, thresholds=ops.default_thresholds(3), add_after=after,
            timesteps=timesteps, backend="triton",
        )  # fmt: skip
        torch.autograd.grad(spikes, (x, weight, bias), grad)
        flat = spikes.detach()
        ops.triton.unpack(ops.triton.pack(flat, 4), 4, torch.empty_like(flat))

    return call
