"""Part 3, kernels: the time of each kernel of a captured step, and the bandwidth that the neurons' kernels reach."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.cases import Case
from benchmarks.gpu_parts.clock import copy_bandwidth, synchronize
from benchmarks.gpu_parts.setting import NETWORK, Item, Setting, describe
from multifire.experiments.bench import Network, capture_graphs, kind_of_work
from multifire.nn.block import ConvFire, is_static_input
from multifire.nn.conv import SpikeConv2d
from multifire.utils.device import autocast

COLUMNS = (
    *NETWORK, "kernel", "kind", "launches", "seconds", "share", "bytes", "bytes_per_s", "share_of_copy",
    "copy_bytes_per_s",
)  # fmt: skip
REPLAYS = 5
NAMED = 40
"""Number of kernels that are listed by name, the slowest ones; the times of all others are added up."""
RECIPES = (("cifar10", 128), ("dvs-gesture", None), ("cifar10-small", 128), ("cifar10-dvs", None))


def items(setting: Setting) -> list[Item]:
    """One item for each recipe."""
    guess = 12 if setting.on_gpu else 1.5
    return [
        Item(f"{recipe}, batch {case.shape[1]}", guess, partial(run, case, setting))
        for recipe, batch in RECIPES
        for case in [setting.case(recipe, batch)]
    ]


def run(case: Case, setting: Setting) -> Iterator[dict[str, Any]]:
    """Profile a few replays of a captured step."""
    bandwidth = copy_bandwidth(setting)
    network = Network(case.cfg, setting.device, setting.batch(case), captured=True)
    capture_graphs([network.step])
    kernels = _profile(network, setting)
    total = sum(seconds for _, seconds in kernels.values())
    moved = bytes_to_move(network)
    named = sorted(kernels, key=lambda name: -kernels[name][1])
    listed = [*dict.fromkeys([*named[:NAMED], *(name for name in moved if name in kernels)])]
    for name in [*listed, *(name for name in moved if name not in kernels)]:
        launches, seconds = kernels.get(name, (0.0, 0.0))
        row = describe(case) | {
            "kernel": name[:160], "kind": kind_of_work(name, setting.device), "launches": launches, "seconds": seconds,
            "share": seconds / total, "copy_bytes_per_s": bandwidth,
        }  # fmt: skip
        if name in moved:
            row["bytes"] = moved[name]
            if seconds:
                row |= {"bytes_per_s": moved[name] / seconds, "share_of_copy": moved[name] / seconds / bandwidth}
        yield row
    rest = [kernels[name] for name in named if name not in listed]
    yield describe(case) | {
        "kernel": f"{len(rest)} others", "kind": "the rest", "launches": sum(n for n, _ in rest),
        "seconds": sum(seconds for _, seconds in rest), "share": sum(seconds for _, seconds in rest) / total,
        "copy_bytes_per_s": bandwidth,
    }  # fmt: skip


def _profile(network: Network, setting: Setting) -> dict[str, tuple[float, float]]:
    """Return for each kernel, on a CPU for each operator, its launches and seconds in one step."""
    with torch.profiler.profile() as profile:
        for _ in range(REPLAYS):
            network.step()
        synchronize(setting)
    found: dict[str, tuple[float, float]] = {}
    for event in profile.key_averages():
        if (event.device_type == torch.autograd.DeviceType.CUDA) == setting.on_gpu:
            time = event.self_device_time_total if setting.on_gpu else event.self_cpu_time_total
            found[event.key] = (event.count / REPLAYS, 1e-6 * time / REPLAYS)
    return found


@torch.no_grad()
def bytes_to_move(network: Network) -> dict[str, int]:
    """Return the bytes that each kernel of the neurons must read and write in a step, if it does so once.

    Not counted: scratch memory of `backward`, and its second reading of the currents, for more time steps than one
    segment; sums and coefficients per channel.
    """
    moved: dict[str, int] = dict.fromkeys(("measure", "forward", "backward", "finish", "pack", "unpack"), 0)

    def add_layer(layer: nn.Module, inputs: tuple[Tensor], sums: dict[str, Any], spikes: Tensor) -> None:
        spike_bytes = spikes.nbytes
        is_static = is_static_input(inputs[0])
        x_bytes = spike_bytes // len(spikes) if is_static else spike_bytes
        before, after = (spike_bytes * (sums.get(name) is not None) for name in ("add_before", "add_after"))
        # The gradients of a static x are summed over time in fp32.
        dy_bytes = 4 * (spikes.numel() // len(spikes)) if is_static and not before else spike_bytes
        moved["measure"] += x_bytes
        moved["forward"] += x_bytes + before + after + spike_bytes
        moved["backward"] += x_bytes + before + spike_bytes + dy_bytes
        moved["finish"] += dy_bytes + 2 * x_bytes

    def add_convolution(conv: nn.Module, inputs: tuple[Tensor], _out: Tensor) -> None:
        assert isinstance(conv, SpikeConv2d)
        if conv.max_input is not None:
            pixels = conv.stride[0] * conv.stride[1] if conv.kernel_size == (1, 1) else 1
            size = inputs[0].numel() // pixels * conv.bits // 8 + inputs[0].numel() // pixels * element
            moved["pack"] += size
            moved["unpack"] += size

    element = 2 if network.cfg.precision == "bf16" else 4
    modules = list(network.model.modules())
    handles = [m.register_forward_hook(add_layer, with_kwargs=True) for m in modules if isinstance(m, ConvFire)]
    handles += [m.register_forward_hook(add_convolution) for m in modules if isinstance(m, SpikeConv2d)]
    with autocast(network.y.device, network.cfg.precision):
        network.model.eval()(network.x_TNCHW)
    for handle in handles:
        handle.remove()
    return moved
