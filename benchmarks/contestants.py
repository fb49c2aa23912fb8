"""Who takes part in a measurement, and how each takes a training step and evaluates."""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.cases import Case
from benchmarks.peers import KITS, Kit, build_peer, gradients
from benchmarks.spikes import Moved, moved_in_bf16
from multifire.experiments.bench import Floor, Network
from multifire.nn import kept_for_backward, model_from_config
from multifire.training.optim import make_optimizer
from multifire.training.step import train_step
from multifire.utils.device import autocast


@dataclass(frozen=True)
class Contestant:
    """A framework with its settings, on a case; "floor" is multifire's convolutions alone."""

    framework: str
    case: Case
    precision: str = "fp32"
    compiled: bool = False
    channels_last: bool = False
    note: str = ""
    preload: str = ""
    """A library to load before all others: another malloc."""
    keeps_memory: bool = True
    """Whether malloc keeps what is freed, as it does under the command line of multifire."""

    @property
    def settings(self) -> str:
        """What is printed beside the framework's name."""
        of_peer = ["channels-last" if self.channels_last else "contiguous"] if self.framework in KITS else []
        mode = ["compiled" if self.compiled else "eager"] if self.framework in (*KITS, "reference") else []
        return ", ".join([*filter(None, [self.note]), self.precision, *mode, *of_peer])

    def framework_version(self) -> str:
        return version(self.framework if self.framework in KITS else "multifire")


class Player:
    """A contestant's network, in this process, ready to be told what to do."""

    def __init__(self, contestant: Contestant, dtype: torch.dtype = torch.float32):
        self.contestant = contestant
        case = contestant.case
        self.cfg = replace(case.cfg, device="cpu", precision=contestant.precision, backend=_backend(contestant))
        self.x_TNCHW, self.y = case.batch()
        torch.manual_seed(self.cfg.seed)
        self.network, self.kit = _build(contestant, self.cfg)
        self.network.to(dtype)
        if contestant.channels_last:
            self.network.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
            frames = self.x_TNCHW[0] if case.still else self.x_TNCHW.flatten(0, 1)
            self.x_TNCHW = frames.contiguous(memory_format=torch.channels_last).view_as(frames)
            self.x_TNCHW = self.x_TNCHW.expand(case.shape) if case.still else self.x_TNCHW.unflatten(0, case.shape[:2])
        self.called: Any = torch.compile(self.network) if contestant.compiled else self.network
        self.optimizer = make_optimizer(self.network, self.cfg.optim)

    def step(self) -> float:
        """One training step; its loss."""
        self._reset()
        self.network.train()
        done = train_step(self.called, self.optimizer, self.x_TNCHW, self.y, self.cfg)
        return (done.totals[0] / done.totals[2]).item()

    @torch.no_grad()
    def evaluate(self) -> float:
        """One forward pass in evaluation mode; the greatest logit, so that it cannot be left out."""
        self._reset()
        self.network.eval()
        with autocast(self.x_TNCHW.device, self.cfg.precision):
            return float(self.called(self.x_TNCHW).max())

    def compare(self) -> dict[str, Tensor]:
        """Logits in training and in evaluation, and every gradient of a training step, with ε → 0; for float64."""
        for module in self.network.modules():
            if hasattr(module, "eps"):
                setattr(module, "eps", 1e-30)  # noqa: B010 - a norm's, which no type here says
        x_TNCHW = self.x_TNCHW.double()
        self._reset()
        self.network.train()
        logits = self.called(x_TNCHW)
        torch.nn.functional.cross_entropy(logits, self.y).backward()
        self._reset()
        with torch.no_grad():
            evaluated = self.called.eval()(x_TNCHW)
        threshold = self.kit.thresholds[0] if self.kit else 1.0
        named = {f"∂{name}": grad.detach() for name, grad in gradients(self.network, threshold).items()}
        return {"logits": logits.detach(), "evaluated": evaluated} | named

    def kept(self) -> tuple[int, int]:
        """Bytes that autograd keeps of a forward pass, and the neuron-steps that they serve; of multifire's alone."""
        with autocast(self.x_TNCHW.device, self.cfg.precision):
            kept = kept_for_backward(self.network.train(), self.x_TNCHW)
        return kept.bytes, kept.neuron_steps

    def moved(self) -> dict[str, Moved]:
        """Of each layer in training, the shares of spikes that bf16 moves; of multifire's alone."""
        reference = model_from_config(self.cfg.model, "reference")
        reference.load_state_dict(self.network.state_dict())
        return moved_in_bf16(self.network.train(), reference.train(), self.x_TNCHW)

    def _reset(self) -> None:
        if self.kit:
            self.kit.reset(self.network)


def _backend(contestant: Contestant) -> str:
    return "reference" if contestant.framework == "reference" else "auto"


def _build(contestant: Contestant, cfg) -> tuple[nn.Module, Kit | None]:
    ours = model_from_config(cfg.model, cfg.backend)
    if contestant.framework not in KITS:
        return ours, None
    kit = KITS[contestant.framework](cfg.model)
    return build_peer(kit, contestant.case.still, ours.state_dict()), kit


class FloorPlayer:
    """The convolutions alone, told what to do in the same words."""

    def __init__(self, contestant: Contestant):
        case = contestant.case
        cfg = replace(case.cfg, device="cpu", precision=contestant.precision)
        self.floor = Floor(Network(cfg, torch.device("cpu"), case.batch()))

    def step(self) -> float:
        self.floor.step()
        return float("nan")

    def evaluate(self) -> float:
        self.floor.evaluate()
        return float("nan")


def load_framework(contestant: Contestant) -> None:
    """Import what the contestant needs, so that its libraries do not count as memory of a step."""
    if contestant.framework in KITS:
        KITS[contestant.framework](contestant.case.cfg.model).neuron()


def make_player(contestant: Contestant, precise: bool = False) -> Player | FloorPlayer:
    if contestant.framework == "floor":
        return FloorPlayer(contestant)
    return Player(contestant, torch.float64 if precise else torch.float32)


def timed(call: Callable[[], float]) -> tuple[float, float]:
    """Seconds that the call took, and what it returned."""
    start = time.perf_counter()
    value = call()
    return time.perf_counter() - start, value
