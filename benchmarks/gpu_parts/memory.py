"""Part 5, memory: the peak of a training step, eager and captured, with packed and with unpacked spikes."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from benchmarks.cases import Case
from benchmarks.gpu_parts.clock import expect_captures, free_memory, synchronize
from benchmarks.gpu_parts.setting import NETWORK, Item, Setting, describe
from multifire.experiments.bench import Network, capture_graphs
from multifire.nn import kept_for_backward
from multifire.nn.conv import SpikeConv2d
from multifire.utils.device import autocast
from multifire.utils.memory import peak_resident

COLUMNS = (*NETWORK, "how", "spikes", "peak_bytes", "reserved_bytes", "kept_bytes", "peak_bytes_per_image")
RECIPES = (("cifar10", 128), ("dvs-gesture", None), ("cifar10-dvs", None), ("cifar10-small", 128))


def items(setting: Setting) -> list[Item]:
    """One item for each recipe."""
    guess = 8 if setting.on_gpu else 1.5
    return [
        Item(f"{recipe}, batch {case.shape[1]}", guess, partial(run, case, setting))
        for recipe, batch in RECIPES
        for case in [setting.case(recipe, batch)]
    ]


def run(case: Case, setting: Setting) -> Iterator[dict[str, Any]]:
    """Measure steps in every combination."""
    batch = setting.batch(case)
    for how in ("eager", "captured"):
        for spikes in ("packed", "unpacked"):
            peak = Peak(setting)
            with expect_captures():
                network = Network(case.cfg, setting.device, batch, how == "captured")
                if spikes == "unpacked":
                    keep_unpacked(network)
                capture_graphs([network.step])
            figures = peak.figures()
            with autocast(setting.device, case.cfg.precision):
                kept = kept_for_backward(network.model.train(), network.x_TNCHW).bytes
            row = {"how": how, "spikes": spikes, "kept_bytes": kept, **figures}
            yield describe(case) | row | {"peak_bytes_per_image": figures["peak_bytes"] / case.shape[1]}
            del network
            free_memory(setting)


def keep_unpacked(network: Network) -> None:
    """Let no convolution pack its input: without a bound a GPU cannot. A CPU needs none and packs all the same."""
    for module in network.model.modules():
        if isinstance(module, SpikeConv2d):
            module.max_input = None


class Peak:
    """The largest memory in use since this object was made, without what was in use then."""

    def __init__(self, setting: Setting):
        free_memory(setting)
        synchronize(setting)
        self._setting = setting
        if setting.on_gpu:
            torch.cuda.reset_peak_memory_stats(setting.device)
        self._before = self._used()

    def figures(self) -> dict[str, int]:
        """Return bytes. On a GPU: in use, and reserved by torch. On a CPU: the growth of the process."""
        synchronize(self._setting)
        if not self._setting.on_gpu:
            return {"peak_bytes": peak_resident() - self._before[0]}
        device = self._setting.device
        now = (torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device))
        return dict(
            zip(("peak_bytes", "reserved_bytes"), (a - b for a, b in zip(now, self._before, strict=True)), strict=True)
        )

    def _used(self) -> tuple[int, int]:
        if not self._setting.on_gpu:
            return peak_resident(), 0
        return torch.cuda.memory_allocated(self._setting.device), torch.cuda.memory_reserved(self._setting.device)
