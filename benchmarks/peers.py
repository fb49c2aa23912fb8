"""The networks of multifire written with other frameworks, in each one's own idiom, with multifire's weights.

Both follow multifire's topology and parameter names; what differs is whose neuron, norm and time loop runs. Their norms
have ε inside the root, where tdBN's definition has it outside: the two agree as ε → 0, which is how they are compared.

Shapes: x_TNCHW is [time, sample, channel, row, column].
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import reduce

import torch
from torch import Tensor, nn

from multifire import ops
from multifire.config import ModelConfig
from multifire.config.architecture import parse_model_name
from multifire.ops.reference import Fire


class Kit(ABC):
    """What a network is made of: the parts of one framework."""

    name: str

    def __init__(self, model: ModelConfig):
        self.model = model
        self.thresholds = model.thresholds or ops.default_thresholds(model.levels, width=model.surrogate_width)

    @abstractmethod
    def conv(self, before: int, after: int, kernel: int, stride: int) -> nn.Module:
        """A convolution of [T, N, C, H, W] without bias."""

    @abstractmethod
    def norm(self, channels: int, affine: bool = True) -> nn.Module:
        """tdBN of [T, N, C, H, W], whose weight holds V_th·γ."""

    @abstractmethod
    def neuron(self) -> nn.Module:
        """MLF, [T, ...] -> spikes [T, ...]."""

    @abstractmethod
    def reset(self, network: nn.Module) -> None:
        """Put every membrane back to zero."""


class SpikingJelly(Kit):
    """Multi-step mode; a level is a LIFNode, a norm a ThresholdDependentBatchNorm2d.

    LIFNode charges by v - v / τ + x, so τ = 1 / (1 - decay).
    """

    name = "spikingjelly"

    def conv(self, before, after, kernel, stride):
        from spikingjelly.activation_based import layer  # pyright: ignore[reportMissingImports]

        return layer.Conv2d(before, after, kernel, stride, padding=kernel // 2, bias=False, step_mode="m")

    def norm(self, channels, affine=True):
        from spikingjelly.activation_based import layer  # pyright: ignore[reportMissingImports]

        if affine:
            return layer.ThresholdDependentBatchNorm2d(1.0, self.thresholds[0], channels)
        return layer.BatchNorm2d(channels, affine=False, step_mode="m")

    def neuron(self):
        from spikingjelly.activation_based import neuron, surrogate  # pyright: ignore[reportMissingImports]

        model = self.model
        _only_rect(model)
        return Sum(
            neuron.LIFNode(
                1 / (1 - model.decay),
                decay_input=False,
                v_threshold=threshold,
                v_reset=0.0,
                surrogate_function=surrogate.Rect(1 / model.surrogate_width),
                detach_reset=model.detach_reset,
                step_mode="m",
            )
            for threshold in self.thresholds
        )

    def reset(self, network):
        from spikingjelly.activation_based import functional  # pyright: ignore[reportMissingImports]

        functional.reset_net(network)


class SnnTorch(Kit):
    """A loop over time around Leaky neurons that reset to zero, one for each level."""

    name = "snntorch"

    def conv(self, before, after, kernel, stride):
        return Folded(nn.Conv2d(before, after, kernel, stride, padding=kernel // 2, bias=False))

    def norm(self, channels, affine=True):
        return Folded(nn.BatchNorm2d(channels, affine=affine))

    def neuron(self):
        _only_rect(self.model)
        return LoopOverTime([_leaky(self.model, threshold) for threshold in self.thresholds])

    def reset(self, network):
        for module in network.modules():
            if isinstance(module, LoopOverTime):
                module.reset()


KITS: dict[str, type[Kit]] = {kit.name: kit for kit in (SpikingJelly, SnnTorch)}


def _only_rect(model: ModelConfig) -> None:
    if model.surrogate != "rect":
        raise ValueError(f"surrogate is {model.surrogate!r}, but the peers are written for 'rect'")


class Sum(nn.Module):
    """The sum of what the levels fire."""

    def __init__(self, levels):
        super().__init__()
        self.levels = nn.ModuleList(levels)

    def forward(self, x: Tensor) -> Tensor:
        return reduce(torch.add, [level(x) for level in self.levels])


class Folded(nn.Module):
    """A module of [N, C, H, W], applied to [T, N, C, H, W]."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, x_TNCHW: Tensor) -> Tensor:
        return self.inner(x_TNCHW.flatten(0, 1)).unflatten(0, x_TNCHW.shape[:2])


class LoopOverTime(nn.Module):
    """snnTorch's idiom: every level is called once a time step with its own membrane."""

    def __init__(self, levels: Sequence[nn.Module]):
        super().__init__()
        self.levels = nn.ModuleList(levels)

    def reset(self) -> None:
        for level in self.levels:
            level.mem, level.spikes = torch.zeros(0), torch.zeros(())

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([reduce(torch.add, [level(current)[0] for level in self.levels]) for current in x])


def _leaky(model: ModelConfig, threshold: float) -> nn.Module:
    import snntorch  # pyright: ignore[reportMissingImports]

    class Level(snntorch.Leaky):
        """Leaky detaches its reset gate, which MLF does not: this one keeps the spikes it fired, gradient and all."""

        def fire(self, mem: Tensor) -> Tensor:
            self.spikes = super().fire(mem)
            return self.spikes

        def mem_reset(self, mem: Tensor) -> Tensor:
            return self.spikes.detach() if model.detach_reset else self.spikes

    return Level(
        model.decay,
        # In float64, so that the network can be compared in it; a 0-dimensional tensor does not promote fp32.
        torch.tensor(threshold, dtype=torch.float64),
        spike_grad=lambda v: Fire.apply(v, "rect", model.surrogate_width),
        reset_mechanism="zero",
    )


class Layer(nn.Module):
    """neuron(norm(conv(x)))."""

    def __init__(self, kit: Kit, before: int, after: int, kernel: int, stride: int, fires: bool = True):
        super().__init__()
        self.conv, self.norm = kit.conv(before, after, kernel, stride), kit.norm(after)
        self.neuron = kit.neuron() if fires else nn.Identity()

    def forward(self, x_TNCHW: Tensor, *, add_before: Tensor | None = None, still: bool = False) -> Tensor:
        y = self.conv(x_TNCHW[:1]).expand(len(x_TNCHW), -1, -1, -1, -1) if still else self.conv(x_TNCHW)
        y = self.norm(y)
        return self.neuron(y if add_before is None else y + add_before)


class Block(nn.Module):
    """multifire's DSBlock, or its PlainBlock where `plain`."""

    def __init__(self, kit: Kit, plain: bool, before: int, after: int, stride: int):
        super().__init__()
        self.plain = plain
        self.fire1, self.fire2 = Layer(kit, before, after, 3, stride), Layer(kit, after, after, 3, 1)
        same = before == after and stride == 1
        self.shortcut = None if same else Layer(kit, before, after, 1, stride, fires=not plain)

    def forward(self, x_TNCHW: Tensor) -> Tensor:
        residual = x_TNCHW if self.shortcut is None else self.shortcut(x_TNCHW)
        inner = self.fire1(x_TNCHW)
        return self.fire2(inner, add_before=residual) if self.plain else self.fire2(inner) + residual


class Peer(nn.Module):
    """multifire's SpikingResNet, made of another framework's parts; where `still`, the stem convolves an image once."""

    def __init__(self, kit: Kit, still: bool):
        super().__init__()
        model = kit.model
        block, blocks = parse_model_name(model.name)
        self.still, self.v_threshold = still, kit.thresholds[0]
        self.input_norm = kit.norm(model.in_channels, affine=False) if model.norm_input else None
        self.stem = Layer(kit, model.in_channels, model.width, 3, 1)
        stages, before = [], model.width
        for stage in range(3):
            after = model.width * 2**stage
            shapes = [(before, 1 if stage == 0 else 2), *[(after, 1)] * (blocks - 1)]
            stages.append(nn.Sequential(*(Block(kit, block == "plain", c, after, stride) for c, stride in shapes)))
            before = after
        self.stages = nn.Sequential(*stages)
        self.voting = nn.Linear(before, model.num_classes)

    def forward(self, x_TNCHW: Tensor, *, per_step: bool = False) -> Tensor:
        if self.input_norm is not None:
            x_TNCHW = self.v_threshold * self.input_norm(x_TNCHW)
        x_TNCHW = self.stages(self.stem(x_TNCHW, still=self.still))
        logits_TNK = self.voting(x_TNCHW.permute(0, 1, 3, 4, 2).mean((2, 3)))  # its gradient channels-last, as in ours
        return logits_TNK if per_step else logits_TNK.mean(0)


def build_peer(kit: Kit, still: bool, weights: dict[str, Tensor]) -> Peer:
    """The peer of multifire's network with these weights, in float64, where V_th·γ is not rounded."""
    network = Peer(kit, still).double()
    own = network.state_dict()
    theirs = {name: _to_peer(name, value.double(), network.v_threshold) for name, value in weights.items()}
    names = {_plain(name): name for name in own}
    missing = [name for name in theirs if name not in names]
    extra = [name for name in names if name not in theirs and not _is_constant(name)]
    assert not [*missing, *extra], f"no place for {missing}, nothing for {extra}"
    network.load_state_dict({names[name]: value for name, value in theirs.items()}, strict=False)
    return network


def gradients(network: nn.Module, v_threshold: float = 1.0) -> dict[str, Tensor]:
    """The gradients of multifire's parameters; a peer's norms hold V_th·γ, whose gradient is 1/V_th of γ's."""
    found = {_plain(name): p.grad for name, p in network.named_parameters()}
    return {
        name: grad * (v_threshold if name.endswith("norm.weight") else 1)
        for name, grad in found.items()
        if grad is not None
    }


def _to_peer(name: str, value: Tensor, v_threshold: float) -> Tensor:
    return v_threshold * value if name.endswith("norm.weight") else value


def _plain(name: str) -> str:
    return name.replace(".inner.", ".").removeprefix("_orig_mod.")


def _is_constant(name: str) -> bool:
    """Buffers that hold no weights: batches seen, and what snnTorch keeps of a neuron's settings."""
    return name.endswith("num_batches_tracked") or ".neuron." in name
