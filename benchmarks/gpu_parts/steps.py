"""Part 2, steps: training step and evaluation of the recipes, eager and captured, beside convolutions and a copy."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import nn

from benchmarks.cases import Case
from benchmarks.gpu_parts.clock import alternate, copier, expect_captures, free_memory, times
from benchmarks.gpu_parts.setting import NETWORK, TIMES, Item, Setting, describe
from multifire.experiments.bench import Floor, Network
from multifire.nn.block import ConvFire
from multifire.utils.device import autocast

COLUMNS = (*NETWORK, "what", "how", *TIMES, "images_per_s", "bytes", "bytes_per_s")
CASES = (("cifar10", 128, "bf16"), ("cifar10-small", 128, "bf16"), ("dvs-gesture", None, "bf16"),
         ("cifar10-dvs", None, "bf16"), ("cifar10", 64, "bf16"), ("cifar10", 128, "fp32"))  # fmt: skip
PASSES = {"training step": 9, "evaluation": 2}
"""How often the neurons must read or write each of their values, if all goes through memory (design, section 8).

Step: forward reads twice and writes once; backward reads gradient and current twice and writes once, in two passes.
Evaluation: reads once, writes once.
"""


def items(setting: Setting) -> list[Item]:
    """One item for each recipe, batch size and precision; default batch sizes are the recipes'."""
    return [
        Item(
            f"{recipe}, batch {case.shape[1]}, {precision}", 25 if setting.on_gpu else 1.5, partial(run, case, setting)
        )
        for recipe, batch, precision in CASES
        for case in [setting.case(recipe, batch, precision)]
    ]


def run(case: Case, setting: Setting) -> Iterator[dict[str, Any]]:
    """Time the calls of `multifire train`, eager and captured, the captured convolutions, and a copy of all bytes."""
    batch = setting.batch(case)
    networks = {how: Network(case.cfg, setting.device, batch, how == "captured") for how in ("captured", "eager")}
    floor = Floor(networks["captured"])
    values = neuron_steps(networks["eager"]) * (2 if case.cfg.precision == "bf16" else 4)
    for what, method in {"training step": "step", "evaluation": "evaluate"}.items():
        size = PASSES[what] * values
        calls = {how: getattr(network, method) for how, network in networks.items()}
        calls |= {"convolutions": getattr(floor, method), "copy of the neurons' bytes": copier(size, setting)}
        with expect_captures():
            measured = alternate(calls, setting)
        for how, seconds in measured.items():
            row = times(seconds, measured["convolutions"].device, setting)
            row |= {"images_per_s": case.shape[1] / row["median_s"]}
            if how.startswith("copy"):
                row |= {"bytes": size, "bytes_per_s": size / row["median_s"]}
            yield describe(case) | {"what": what, "how": how} | row
        del calls
        free_memory(setting)


@torch.no_grad()
def neuron_steps(network: Network) -> int:
    """Return the number of neurons times samples and time steps: the values of all layers' spikes."""
    count = 0

    def add(_module: nn.Module, _inputs: Any, spikes: torch.Tensor) -> None:
        nonlocal count
        count += spikes.numel()

    handles = [m.register_forward_hook(add) for m in network.model.modules() if isinstance(m, ConvFire)]
    with autocast(network.y.device, network.cfg.precision):
        network.model.eval()(network.x_TNCHW)
    for handle in handles:
        handle.remove()
    return count
