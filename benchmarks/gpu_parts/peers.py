"""Part 6, peers: the CIFAR-10 network in other frameworks, each with several settings, beside multifire."""

import contextlib
import importlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.cases import Case
from benchmarks.gpu_parts.clock import alternate, expect_captures, synchronize, times
from benchmarks.gpu_parts.memory import Peak
from benchmarks.gpu_parts.setting import NETWORK, TIMES, Item, Setting, describe
from benchmarks.peers import PEER_FRAMEWORKS, build_peer_network
from multifire.experiments.bench import Network, capture_graphs
from multifire.nn import model_from_config
from multifire.training.optim import make_optimizer
from multifire.training.step import StepResult, train_step
from multifire.utils.cuda_graph import WARM_UP_CALLS, CapturedFunction

COLUMNS = (
    *NETWORK, "framework", "framework_version", "settings", "surrogate", "implementation", "first_call_s", *TIMES,
    "images_per_s", "peak_bytes", "loss",
)  # fmt: skip
Step = Callable[[], StepResult]


@dataclass(frozen=True)
class Peer:
    """A framework and its settings."""

    framework: str
    """Name of a peer framework, or "reference", multifire's own in torch operators."""
    how: str = "captured"
    """eager; captured: the whole step as a CUDA graph; compiled: by torch.compile, then captured too."""
    precision: str = "bf16"
    layout: str = "channels-last"
    surrogate: str = "rect"
    """SpikingJelly's Triton neurons know "atan"; for "rect" it takes torch operators."""


PEERS = (
    Peer("spikingjelly", surrogate="atan"),
    Peer("spikingjelly", layout="contiguous", surrogate="atan"),
    Peer("spikingjelly", how="eager", surrogate="atan"),
    Peer("spikingjelly"),
    Peer("snntorch"),
    Peer("reference"),
    Peer("spikingjelly", how="eager"),
    Peer("snntorch", how="eager"),
    Peer("reference", how="eager"),
    Peer("spikingjelly", precision="fp32", surrogate="atan"),
    Peer("reference", how="compiled"),
    Peer("spikingjelly", how="compiled", surrogate="atan"),
    Peer("spikingjelly", how="compiled"),
)
GUESSES = {"eager": 12.0, "captured": 12.0, "compiled": 150.0}
"""Seconds on the machine of an H100."""


def items(setting: Setting) -> list[Item]:
    """One item for each peer, the probably fastest ones first."""
    return [
        Item(
            ", ".join([peer.framework, peer.precision, peer.how, peer.layout, peer.surrogate]),
            GUESSES[peer.how] if setting.on_gpu else 1.5,
            partial(run, peer, setting),
        )
        for peer in PEERS
    ]


def run(peer: Peer, setting: Setting) -> Iterator[dict[str, Any]]:
    """Time a peer's training step in turns with multifire's captured one, which ratios are to; measure their memory."""
    case = setting.case("cifar10", 128, peer.precision, surrogate=peer.surrogate)
    row = describe(case) | {"framework": peer.framework, "surrogate": peer.surrogate}
    if why := why_missing(peer.framework):
        yield row | {"settings": peer.precision, "error": f"missing: {why}"}
        return
    batch, peak = setting.batch(case), Peak(setting)
    with expect_captures():
        ours = Network(case.cfg, setting.device, batch, captured=True)
        capture_graphs([ours.step])
    our_peak = peak.figures()["peak_bytes"]
    contestant = Contestant(peer, case, batch, setting)
    for how in ["compiled", "compiled and captured"] if peer.how == "compiled" else [peer.how]:
        peak = Peak(setting)
        with expect_captures():
            step = contestant.make_step(how)
            first_call_s = _seconds(step, setting)
            capture_graphs([step])
            their_peak = peak.figures()["peak_bytes"] + contestant.bytes
            measured = alternate({"ours": ours.step, "theirs": step}, setting)
        samples = case.shape[1]
        figures = {
            "ours": {
                "framework": "multifire", "settings": f"{peer.precision}, captured", "peak_bytes": our_peak,
                "loss": float(ours.step()) / samples,
            },
            "theirs": {
                "settings": ", ".join([peer.precision, how, peer.layout]), "peak_bytes": their_peak,
                "framework_version": version_of(peer.framework), "implementation": implementation(peer.framework),
                "first_call_s": first_call_s, "loss": float(step().totals[0]) / samples,
            },
        }  # fmt: skip
        for name, seconds in measured.items():
            timed = times(seconds, measured["ours"].device, setting)
            yield row | timed | {"images_per_s": samples / timed["median_s"]} | figures[name]


def why_missing(framework: str) -> str | None:
    """Return why a framework cannot be imported, or None."""
    if framework == "reference":
        return None
    try:
        for name in [framework, *(["spikingjelly.activation_based.neuron"] if framework == "spikingjelly" else [])]:
            importlib.import_module(name)
    except Exception as error:  # whatever an import of foreign code raises
        return f"{type(error).__name__}: {error}"
    return None


def version_of(framework: str) -> str:
    """Return the version of the package that implements a framework."""
    return "" if framework == "reference" else version(framework)


def implementation(framework: str) -> str:
    """Return which neurons SpikingJelly has chosen for the device, as far as it tells."""
    if framework != "spikingjelly":
        return ""
    with contextlib.suppress(Exception):  # private names of another package
        from spikingjelly._ops.lif import _selection  # pyright: ignore[reportMissingImports]

        chosen = [key[1] if value is None else value.name for key, value in _selection._selections.items()]
        return "; ".join(map(str, chosen))
    return ""


class Contestant:
    """A peer's network with multifire's weights, and its optimiser."""

    def __init__(self, peer: Peer, case: Case, batch: tuple[Tensor, Tensor], setting: Setting):
        self._peer, self._case, self._setting = peer, case, setting
        torch.manual_seed(case.cfg.seed)
        network: nn.Module = model_from_config(case.cfg.model, "reference")
        self._framework = None
        if peer.framework in PEER_FRAMEWORKS:
            self._framework = PEER_FRAMEWORKS[peer.framework](case.cfg.model)
            network = build_peer_network(self._framework, case.static, network.state_dict()).float()
        self._network = network.to(setting.device)
        self._x_TNCHW, self._y = batch
        if peer.layout == "channels-last":
            self._network.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
            images_NCHW = self._x_TNCHW[0].contiguous(memory_format=torch.channels_last)
            self._x_TNCHW = images_NCHW.expand(self._x_TNCHW.shape)
        self._compiled: Any = None
        self._optimizer = make_optimizer(self._network, case.cfg.optim)
        self.bytes = sum(p.nbytes for p in self._network.parameters())

    def make_step(self, how: str) -> Step:
        """Return a training step of the batch: forward, loss, backward and optimiser."""
        network = self._compile() if how.startswith("compiled") else self._network

        def step(x_TNCHW: Tensor, y: Tensor) -> StepResult:
            if self._framework is not None:
                self._framework.reset(self._network)
            return train_step(network, self._optimizer, x_TNCHW, y, self._case.cfg)

        called = self._capture(step) if how.endswith("captured") else step
        return lambda: called(self._x_TNCHW, self._y)

    def _compile(self) -> Any:
        """Return the compiled network. Without a GPU its graph is traced, and run without waiting for a compiler."""
        if self._compiled is None:
            torch.compiler.reset()  # else constants of other settings become variables
            self._compiled = torch.compile(self._network, backend="inductor" if self._setting.on_gpu else "eager")
        return self._compiled

    def _capture(self, step: Callable[..., StepResult]) -> Callable[..., StepResult]:
        """Capture the step: SpikingJelly by its own means, the others by multifire's."""
        if self._peer.framework == "spikingjelly" and self._setting.on_gpu:
            with contextlib.suppress(ImportError):  # older than #740
                from spikingjelly.activation_based._cuda_graph import (  # pyright: ignore[reportMissingImports]
                    StaticCudaGraph,
                )

                return StaticCudaGraph(step, WARM_UP_CALLS)
        return CapturedFunction(step, "training steps")


def _seconds(call: Callable[[], Any], setting: Setting) -> float:
    synchronize(setting)
    start = time.perf_counter()
    call()
    synchronize(setting)
    return time.perf_counter() - start
