"""Define the contestants of a benchmark, and run their training steps and evaluations."""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.cases import Case
from benchmarks.peers import PEER_FRAMEWORKS, PeerFramework, build_peer_network, multifire_gradients
from benchmarks.spikes import MovedSpikes, moved_spikes_in_bf16
from multifire.experiments.bench import Floor, Network
from multifire.nn import kept_for_backward, model_from_config
from multifire.training.optim import make_optimizer
from multifire.training.step import train_step
from multifire.utils.device import autocast


@dataclass(frozen=True)
class Contestant:
    """A framework with its settings, and the case that it runs."""

    framework: str
    """Name of a peer framework, or "multifire", "reference" (its reference backend) or "floor" (its convolutions)."""
    case: Case
    precision: str = "fp32"
    compiled: bool = False
    channels_last: bool = False
    note: str = ""
    """Text to print before the settings."""
    preload: str = ""
    """Path of a library to load before all others, such as another malloc."""
    keeps_memory: bool = True
    """True: malloc keeps freed memory for reuse, as set by multifire's command line. False: malloc's default."""

    @property
    def settings(self) -> str:
        """Settings as text, such as "bf16, compiled, channels-last"."""
        is_peer = self.framework in PEER_FRAMEWORKS
        layout = ["channels-last" if self.channels_last else "contiguous"] if is_peer else []
        mode = ["compiled" if self.compiled else "eager"] if is_peer or self.framework == "reference" else []
        return ", ".join([*filter(None, [self.note]), self.precision, *mode, *layout])

    def framework_version(self) -> str:
        """Return the installed version of the package that implements the framework."""
        return version(self.framework if self.framework in PEER_FRAMEWORKS else "multifire")


class Player:
    """The network, batch and optimiser of a contestant in this process, with the calls that are measured."""

    def __init__(self, contestant: Contestant, dtype: torch.dtype = torch.float32):
        self.contestant = contestant
        case = contestant.case
        self.cfg = replace(case.cfg, device="cpu", precision=contestant.precision, backend=_backend(contestant))
        self.x_TNCHW, self.y = case.batch()
        torch.manual_seed(self.cfg.seed)
        self.network, self.peer_framework = _build(contestant, self.cfg)
        self.network.to(dtype)
        if contestant.channels_last:
            self.network.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
            images = self.x_TNCHW[0] if case.static else self.x_TNCHW.flatten(0, 1)
            images = images.contiguous(memory_format=torch.channels_last).view_as(images)
            self.x_TNCHW = images.expand(case.shape) if case.static else images.unflatten(0, case.shape[:2])
        self.callable_network: Any = torch.compile(self.network) if contestant.compiled else self.network
        self.optimizer = make_optimizer(self.network, self.cfg.optim)

    def step(self) -> float:
        """Do one training step and return its mean loss."""
        self._reset()
        self.network.train()
        result = train_step(self.callable_network, self.optimizer, self.x_TNCHW, self.y, self.cfg)
        return (result.totals[0] / result.totals[2]).item()

    @torch.no_grad()
    def evaluate(self) -> float:
        """Do one forward pass in evaluation mode and return the largest logit.

        The result depends on the output, so that no compiler can skip the computation.
        """
        self._reset()
        self.network.eval()
        with autocast(self.x_TNCHW.device, self.cfg.precision):
            return float(self.callable_network(self.x_TNCHW).max())

    def compare(self) -> dict[str, Tensor]:
        """Return the logits in training and in evaluation, and every gradient of a training step.

        Norms run with ε = 1e-30, since the frameworks place ε differently. The network must be in float64.
        """
        for module in self.network.modules():
            if hasattr(module, "eps"):
                setattr(module, "eps", 1e-30)  # noqa: B010 - the type nn.Module does not declare eps
        x_TNCHW = self.x_TNCHW.double()
        self._reset()
        self.network.train()
        logits = self.callable_network(x_TNCHW)
        torch.nn.functional.cross_entropy(logits, self.y).backward()
        self._reset()
        with torch.no_grad():
            evaluated = self.callable_network.eval()(x_TNCHW)
        v_threshold = self.peer_framework.thresholds[0] if self.peer_framework else 1.0
        gradients = {f"∂{name}": grad.detach() for name, grad in multifire_gradients(self.network, v_threshold).items()}
        return {"logits": logits.detach(), "evaluated": evaluated} | gradients

    def kept(self) -> tuple[int, int]:
        """Return the bytes that autograd keeps after a forward pass, and the number of neuron-steps.

        This works for multifire's own networks only.
        """
        with autocast(self.x_TNCHW.device, self.cfg.precision):
            kept = kept_for_backward(self.network.train(), self.x_TNCHW)
        return kept.bytes, kept.neuron_steps

    def moved(self) -> dict[str, MovedSpikes]:
        """Return for each layer the fractions of spikes that differ because of bf16, in training mode.

        This works for multifire's own networks only.
        """
        reference = model_from_config(self.cfg.model, "reference")
        reference.load_state_dict(self.network.state_dict())
        return moved_spikes_in_bf16(self.network.train(), reference.train(), self.x_TNCHW)

    def _reset(self) -> None:
        if self.peer_framework:
            self.peer_framework.reset(self.network)


def _backend(contestant: Contestant) -> str:
    return "reference" if contestant.framework == "reference" else "auto"


def _build(contestant: Contestant, cfg) -> tuple[nn.Module, PeerFramework | None]:
    network = model_from_config(cfg.model, cfg.backend)
    if contestant.framework not in PEER_FRAMEWORKS:
        return network, None
    framework = PEER_FRAMEWORKS[contestant.framework](cfg.model)
    return build_peer_network(framework, contestant.case.static, network.state_dict()), framework


class FloorPlayer:
    """The convolutions of a contestant's network alone, with the measured calls of `Player`; they return NaN."""

    def __init__(self, contestant: Contestant):
        case = contestant.case
        cfg = replace(case.cfg, device="cpu", precision=contestant.precision)
        self.floor = Floor(Network(cfg, torch.device("cpu"), case.batch()))

    def step(self) -> float:
        """Do the forward and backward pass of every convolution."""
        self.floor.step()
        return float("nan")

    def evaluate(self) -> float:
        """Do the forward pass of every convolution."""
        self.floor.evaluate()
        return float("nan")


def load_framework(contestant: Contestant) -> None:
    """Import the libraries that the contestant needs, so that they do not count as memory of a step."""
    if contestant.framework in PEER_FRAMEWORKS:
        PEER_FRAMEWORKS[contestant.framework](contestant.case.cfg.model).neuron()


def make_player(contestant: Contestant, use_float64: bool = False) -> Player | FloorPlayer:
    """Build the network of the contestant, with float64 parameters if `use_float64`."""
    if contestant.framework == "floor":
        return FloorPlayer(contestant)
    return Player(contestant, torch.float64 if use_float64 else torch.float32)


def timed(call: Callable[[], float]) -> tuple[float, float]:
    """Call the function and return the elapsed seconds and its result."""
    start = time.perf_counter()
    value = call()
    return time.perf_counter() - start, value
