"""Build multifire's networks with other frameworks (the peers), with the same weights.

The peer networks have multifire's topology and parameter names. The neurons, the norms and the loop over time are those
of the other framework, used in its usual style. The norms of the peers add ε inside the square root, while tdBN is
defined with ε outside. Both definitions agree for ε → 0, so comparisons use a tiny ε.

Shapes: T time steps, N samples, C channels, H rows, W columns, L classes.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import reduce
from typing import cast

import torch
from torch import Tensor, nn

from multifire import ops
from multifire.config import ModelConfig
from multifire.config.architecture import parse_model_name
from multifire.ops.reference import Fire


class PeerFramework(ABC):
    """Create the layers of a network with one framework."""

    name: str
    """Name of the Python package."""

    def __init__(self, model: ModelConfig):
        self.model = model
        self.thresholds = model.thresholds or ops.default_thresholds(model.levels, width=model.surrogate_width)

    @abstractmethod
    def conv(self, in_channels: int, out_channels: int, kernel: int, stride: int) -> nn.Module:
        """Return a convolution for [T, N, C, H, W] without bias."""

    @abstractmethod
    def norm(self, channels: int, affine: bool = True) -> nn.Module:
        """Return tdBN for [T, N, C, H, W]; its weight is V_th·γ."""

    @abstractmethod
    def neuron(self) -> nn.Module:
        """Return an MLF neuron, which computes spikes [T, ...] from its input current [T, ...]."""

    @abstractmethod
    def reset(self, network: nn.Module) -> None:
        """Set every membrane potential of the network to zero."""


class SpikingJelly(PeerFramework):
    """SpikingJelly in multi-step mode: LIFNode for each level, ThresholdDependentBatchNorm2d for each norm.

    LIFNode computes v = v - v / τ + x, so τ = 1 / (1 - decay).
    """

    name = "spikingjelly"

    def conv(self, in_channels, out_channels, kernel, stride):
        from spikingjelly.activation_based import layer  # pyright: ignore[reportMissingImports]

        return layer.Conv2d(in_channels, out_channels, kernel, stride, padding=kernel // 2, bias=False, step_mode="m")

    def norm(self, channels, affine=True):
        from spikingjelly.activation_based import layer  # pyright: ignore[reportMissingImports]

        if affine:
            return layer.ThresholdDependentBatchNorm2d(1.0, self.thresholds[0], channels)
        return layer.BatchNorm2d(channels, affine=False, step_mode="m")

    def neuron(self):
        from spikingjelly.activation_based import neuron, surrogate  # pyright: ignore[reportMissingImports]

        model = self.model
        # Both are multifire's derivatives: 1/a for |v| < a/2, and 1/(a·(1 + (π·v/a)²)), for width a.
        surrogates = {
            "rect": surrogate.Rect(1 / model.surrogate_width),
            "atan": surrogate.ATan(2 / model.surrogate_width),
        }
        _check_surrogate(model, *surrogates)
        return SumOfLevels(
            neuron.LIFNode(
                1 / (1 - model.decay),
                decay_input=False,
                v_threshold=threshold,
                v_reset=0.0,
                surrogate_function=surrogates[model.surrogate],
                detach_reset=model.detach_reset,
                step_mode="m",
            )
            for threshold in self.thresholds
        )

    def reset(self, network):
        from spikingjelly.activation_based import functional  # pyright: ignore[reportMissingImports]

        functional.reset_net(network)


class SnnTorch(PeerFramework):
    """snnTorch: a loop over time that calls a Leaky neuron with reset to zero for each level."""

    name = "snntorch"

    def conv(self, in_channels, out_channels, kernel, stride):
        return TimeDistributed(nn.Conv2d(in_channels, out_channels, kernel, stride, padding=kernel // 2, bias=False))

    def norm(self, channels, affine=True):
        return TimeDistributed(nn.BatchNorm2d(channels, affine=affine))

    def neuron(self):
        _check_surrogate(self.model, "rect")
        return LoopOverTime([_leaky(self.model, threshold) for threshold in self.thresholds])

    def reset(self, network):
        for module in network.modules():
            if isinstance(module, LoopOverTime):
                module.reset()


PEER_FRAMEWORKS: dict[str, type[PeerFramework]] = {peer.name: peer for peer in (SpikingJelly, SnnTorch)}


def _check_surrogate(model: ModelConfig, *supported: str) -> None:
    if model.surrogate not in supported:
        raise ValueError(f"surrogate is {model.surrogate!r}, expected {' or '.join(supported)} for the peer's network")


class SumOfLevels(nn.Module):
    """Add the spikes of all levels, which receive the same input."""

    def __init__(self, levels):
        super().__init__()
        self.levels = nn.ModuleList(levels)

    def forward(self, x: Tensor) -> Tensor:
        return reduce(torch.add, [level(x) for level in self.levels])


class TimeDistributed(nn.Module):
    """Apply a module for [N, C, H, W] to every time step of [T, N, C, H, W], in one call."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, x_TNCHW: Tensor) -> Tensor:
        return self.inner(x_TNCHW.flatten(0, 1)).unflatten(0, x_TNCHW.shape[:2])


class LoopOverTime(nn.Module):
    """Call every level once for each time step and add their spikes; each level keeps its membrane potential."""

    def __init__(self, levels: Sequence[nn.Module]):
        super().__init__()
        self.levels = nn.ModuleList(levels)

    def reset(self) -> None:
        for level in self.levels:
            device = cast(Tensor, level.threshold).device  # snnTorch keeps to the device of the old membranes
            level.mem, level.spikes = torch.zeros(0, device=device), torch.zeros((), device=device)

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([reduce(torch.add, [level(current)[0] for level in self.levels]) for current in x])


def _leaky(model: ModelConfig, threshold: float) -> nn.Module:
    import snntorch  # pyright: ignore[reportMissingImports]

    class Level(snntorch.Leaky):
        """A Leaky neuron with a reset that passes gradients, as in MLF; snnTorch's own reset is detached.

        `fire` stores the spikes with their gradient, and `mem_reset` returns them.
        """

        def fire(self, mem: Tensor) -> Tensor:
            self.spikes = super().fire(mem)
            return self.spikes

        def mem_reset(self, mem: Tensor) -> Tensor:
            return self.spikes.detach() if model.detach_reset else self.spikes

    return Level(
        model.decay,
        # float64 is needed for the comparison in float64; a 0-dimensional tensor does not promote fp32 tensors.
        torch.tensor(threshold, dtype=torch.float64),
        spike_grad=lambda v: Fire.apply(v, "rect", model.surrogate_width),
        reset_mechanism="zero",
    )


class Layer(nn.Module):
    """Compute neuron(norm(conv(x)) + add_before), or without neurons norm(conv(x)) + add_before.

    If the input is static, the convolution runs on one time step only.
    """

    def __init__(
        self,
        framework: PeerFramework,
        in_channels: int,
        out_channels: int,
        kernel: int,
        stride: int,
        has_neurons: bool = True,
    ):
        super().__init__()
        self.conv = framework.conv(in_channels, out_channels, kernel, stride)
        self.norm = framework.norm(out_channels)
        self.neuron = framework.neuron() if has_neurons else nn.Identity()

    def forward(self, x_TNCHW: Tensor, *, add_before: Tensor | None = None, static: bool = False) -> Tensor:
        y = self.conv(x_TNCHW[:1]).expand(len(x_TNCHW), -1, -1, -1, -1) if static else self.conv(x_TNCHW)
        y = self.norm(y)
        return self.neuron(y if add_before is None else y + add_before)


class Block(nn.Module):
    """The counterpart of multifire's PlainBlock if `plain`, else of its DSBlock."""

    def __init__(self, framework: PeerFramework, plain: bool, in_channels: int, out_channels: int, stride: int):
        super().__init__()
        self.plain = plain
        self.fire1 = Layer(framework, in_channels, out_channels, 3, stride)
        self.fire2 = Layer(framework, out_channels, out_channels, 3, 1)
        self.shortcut = None
        if in_channels != out_channels or stride != 1:
            self.shortcut = Layer(framework, in_channels, out_channels, 1, stride, has_neurons=not plain)

    def forward(self, x_TNCHW: Tensor) -> Tensor:
        residual = x_TNCHW if self.shortcut is None else self.shortcut(x_TNCHW)
        inner = self.fire1(x_TNCHW)
        return self.fire2(inner, add_before=residual) if self.plain else self.fire2(inner) + residual


class PeerNetwork(nn.Module):
    """The counterpart of multifire's SpikingResNet with the layers of another framework.

    If the input is static, the stem convolves the image only once.
    """

    def __init__(self, framework: PeerFramework, static: bool):
        super().__init__()
        model = framework.model
        block, blocks = parse_model_name(model.name)
        is_plain = block == "plain"
        self.static, self.v_threshold = static, framework.thresholds[0]
        self.input_norm = framework.norm(model.in_channels, affine=False) if model.norm_input else None
        self.stem = Layer(framework, model.in_channels, model.width, 3, 1)
        stages, in_channels = [], model.width
        for stage in range(3):
            out_channels = model.width * 2**stage
            inputs_and_strides = [(in_channels, 1 if stage == 0 else 2), *[(out_channels, 1)] * (blocks - 1)]
            stages.append(
                nn.Sequential(
                    *(Block(framework, is_plain, c, out_channels, stride) for c, stride in inputs_and_strides)
                )
            )
            in_channels = out_channels
        self.stages = nn.Sequential(*stages)
        self.voting = nn.Linear(in_channels, model.num_classes)

    def forward(self, x_TNCHW: Tensor, *, per_step: bool = False) -> Tensor:
        if self.input_norm is not None:
            x_TNCHW = self.v_threshold * self.input_norm(x_TNCHW)
        x_TNCHW = self.stages(self.stem(x_TNCHW, static=self.static))
        # The permutation makes the gradient channels-last, as in multifire's network.
        logits_TNL = self.voting(x_TNCHW.permute(0, 1, 3, 4, 2).mean((2, 3)))
        return logits_TNL if per_step else logits_TNL.mean(0)


def build_peer_network(framework: PeerFramework, static: bool, weights: dict[str, Tensor]) -> PeerNetwork:
    """Build the network with a peer framework and load multifire's weights into it.

    The network is in float64, so that V_th·γ is not rounded.
    """
    network = PeerNetwork(framework, static).double()
    peer_names = {_multifire_name(name): name for name in network.state_dict()}
    missing = [name for name in weights if name not in peer_names]
    extra = [name for name in peer_names if name not in weights and not _is_constant(name)]
    assert not [*missing, *extra], f"the peer network lacks {missing}; multifire's network lacks {extra}"
    values = {
        peer_names[name]: _peer_value(name, value.double(), network.v_threshold) for name, value in weights.items()
    }
    network.load_state_dict(values, strict=False)
    return network


def multifire_gradients(network: nn.Module, v_threshold: float = 1.0) -> dict[str, Tensor]:
    """Return the gradients with respect to multifire's parameters, by multifire's names.

        ∂loss/∂γ = V_th · ∂loss/∂(V_th·γ)

    Args:
        network: a network after the backward pass.
        v_threshold: V_th for a peer network, where the norms hold V_th·γ; 1 for multifire's, where they hold γ.
    """
    gradients = {_multifire_name(name): p.grad for name, p in network.named_parameters()}
    return {
        name: grad * (v_threshold if name.endswith("norm.weight") else 1)
        for name, grad in gradients.items()
        if grad is not None
    }


def _peer_value(name: str, value: Tensor, v_threshold: float) -> Tensor:
    """Return the peer network's value for a weight of multifire's network: V_th·γ for γ, all others unchanged."""
    return v_threshold * value if name.endswith("norm.weight") else value


def _multifire_name(name: str) -> str:
    """Return multifire's name for a parameter: without `TimeDistributed.inner` and the prefix of torch.compile."""
    return name.replace(".inner.", ".").removeprefix("_orig_mod.")


def _is_constant(name: str) -> bool:
    """Return True for a buffer that is not a weight: a norm's batch counter, or a setting of an snnTorch neuron."""
    return name.endswith("num_batches_tracked") or ".neuron." in name
