"""The spiking residual network, and the builders of all networks.

tdBN is the threshold-dependent batch norm of `TdBatchNorm2d`.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

from torch import nn

from multifire import ops
from multifire.config import ModelConfig
from multifire.config.architecture import BLOCK_KINDS, GIVEN, NETWORKS, OWN_BLOCKS, architecture
from multifire.nn.block import BLOCKS, ConvFire, MakeNeuron
from multifire.nn.bounds import bound_inputs
from multifire.nn.network import SpikePool, SpikingNetwork
from multifire.nn.neuron import MLF
from multifire.nn.other_blocks import MSBlock, SEWBlock
from multifire.nn.own import OwnNetwork
from multifire.nn.vgg import SpikingVGG
from multifire.utils.errors import unknown

ALL_BLOCKS: dict[str, Callable[..., nn.Module]] = {**BLOCKS, "ms": MSBlock, "sew": SEWBlock}


MakeBlock = Callable[[int, int, int, MakeNeuron], nn.Module]
"""block(in_channels, out_channels, stride, make_neuron): a `Streaming` module, or a class of such."""


def register_block(name: str) -> Callable[[MakeBlock], MakeBlock]:
    """Register a residual block, so that NAME_resnet8, NAME_resnet20 and so on are networks of such blocks.

        @mf.register_block("gated")
        class GatedBlock(mf.nn.Streaming):
            def __init__(self, in_channels, out_channels, stride, make_neuron): ...
            def forward(self, x, stream=None): ...    # passes the stream to every layer

    Raises:
        ValueError: the name exists.
    """

    def register(block: MakeBlock) -> MakeBlock:
        if name in ALL_BLOCKS:
            raise ValueError(f"the block {name!r} exists already; choose another name")
        ALL_BLOCKS[name] = block
        BLOCK_KINDS.append(name)
        OWN_BLOCKS.add(name)
        return block

    return register


class SpikingResNet(SpikingNetwork):
    """Spiking residual network: [T, N, C, H, W] -> logits [N, classes].

        stem → stages of blocks, widths w, 2w, 4w, ... → global average pool → linear voting layer → mean over time

    Args:
        block: "ds", "plain", "ms", "sew" or a registered name, the kind of residual block; or a block of one's own,
            called as block(in_channels, out_channels, stride, make_neuron).
        blocks_per_stage: n for three stages, the depth being 6n + 2; or the number for each stage.
        in_channels: C of the input.
        num_classes: size of the voting layer.
        width: w, channels of the first stage.
        norm_input: normalise the input by a tdBN without γ and β.
        checkpoint_stages: less memory in training for a third more time; see `SpikingNetwork`.
        imagenet: for large images: a 7×7 convolution with stride 2, then 3×3 max pooling of spikes with stride 2.
        make_neuron: called once for each layer of neurons.

    Raises:
        ValueError: an unknown name of a block.

    Source: Feng et al., IJCAI 2022, section 4 and table 1.
    """

    def __init__(
        self,
        block: str | MakeBlock = "ds",
        blocks_per_stage: int | Sequence[int] = 3,
        *,
        in_channels: int = 3,
        num_classes: int = 10,
        width: int = 64,
        norm_input: bool = False,
        checkpoint_stages: bool = False,
        imagenet: bool = False,
        make_neuron: MakeNeuron = MLF,
    ):
        if isinstance(block, str) and block not in ALL_BLOCKS:
            raise unknown("block", block, list(ALL_BLOCKS))
        make_block = ALL_BLOCKS[block] if isinstance(block, str) else block
        kind = next((name for name, known in ALL_BLOCKS.items() if known is make_block), make_block.__name__)
        numbers = (blocks_per_stage,) * 3 if isinstance(blocks_per_stage, int) else tuple(blocks_per_stage)
        stem = ConvFire(in_channels, width, 7 if imagenet else 3, 2 if imagenet else 1, make_neuron())
        stages: list[list[nn.Module]] = []
        channels = width
        for stage, blocks in enumerate(numbers):
            out_channels = width * 2**stage
            shapes = [(channels, 1 if stage == 0 else 2), *[(out_channels, 1)] * (blocks - 1)]
            stages.append([make_block(first, out_channels, stride, make_neuron) for first, stride in shapes])
            channels = out_channels
        if imagenet:
            stages[0].insert(0, SpikePool(3, 2))
        super().__init__(
            stem,
            stages,
            channels,
            num_classes=num_classes,
            norm_input=norm_input,
            checkpoint_stages=checkpoint_stages,
            last=make_neuron() if kind == "ms" else None,  # a membrane-shortcut block gives currents
            name=f"{kind}_resnet{2 * sum(numbers) + 2}",
        )
        bound_inputs(self.stem, [layer for stage in stages for layer in stage])


def build_model(
    name: str,
    in_channels: int = 3,
    num_classes: int = 10,
    width: int = 64,
    levels: int = 3,
    *,
    thresholds: tuple[float, ...] | None = None,
    decay: float = 0.25,
    surrogate: str = "rect",
    surrogate_width: float = 1.0,
    detach_reset: bool = False,
    learn_thresholds: bool = False,
    learn_decay: bool = False,
    membranes: str = "own",
    reset: str = "zero",
    signed: bool = False,
    norm_input: bool = False,
    checkpoint_stages: bool = False,
    backend: str = "auto",
) -> SpikingNetwork:
    """Build a network by name: {ds,plain,ms,sew}_resnet{6n+2} or 18 or 34, vgg9, vgg11.

    Args:
        name: kind of block and depth.
        in_channels: channels of a frame.
        num_classes: size of the voting layer.
        width: channels of the first stage.
        levels: K, firing levels of a neuron.
        thresholds: θ, one for each level (default: 0.6, 0.6 + a, 0.6 + 2a, ... for surrogate width a).
        decay: factor of the membrane from one time step to the next.
        surrogate: "rect", "triangle", "atan", "sigmoid", "gaussian" or a registered name.
        surrogate_width: width a of the surrogate.
        detach_reset: no gradient through the spikes in the reset; see `MLF`.
        learn_thresholds: learn the thresholds of each layer, starting from `thresholds`.
        learn_decay: learn the decay of each layer, starting from `decay`.
        membranes: "own" or "shared"; see `MLF`, also for `reset` and `signed`.
        reset: "zero", "subtract" or "any".
        signed: levels fire in both directions.
        norm_input: normalise the input by a tdBN without γ and β.
        checkpoint_stages: less memory in training for a third more time; see `SpikingResNet`.
        backend: "auto" or a name in `multifire.ops.BACKENDS`.

    Raises:
        ValueError: another name, thresholds that are not one for each level, or an unknown backend.
    """
    found = architecture(name)
    if thresholds is None:
        thresholds = ops.default_thresholds(levels, width=surrogate_width)
    if len(thresholds) != levels or levels < 1:
        raise ValueError(f"thresholds is {thresholds}, expected one for each of levels = {levels} >= 1")
    if backend not in ("auto", *ops.BACKENDS):
        raise unknown("backend", backend, ["auto", *ops.BACKENDS])
    make_neuron = partial(
        MLF,
        thresholds,
        decay,
        learn_thresholds=learn_thresholds,
        learn_decay=learn_decay,
        membranes=membranes,
        reset=reset,
        signed=signed,
        surrogate=surrogate,
        width=surrogate_width,
        detach_reset=detach_reset,
        backend=backend,
    )
    if found.kind == "vgg":
        network = partial(SpikingVGG, found.stages)
    else:
        network = partial(SpikingResNet, found.kind, found.stages, imagenet=found.imagenet)
    return network(
        in_channels=in_channels,
        num_classes=num_classes,
        width=width,
        norm_input=norm_input,
        checkpoint_stages=checkpoint_stages,
        make_neuron=make_neuron,
    )


def model_from_config(model: ModelConfig, backend: str = "auto") -> SpikingNetwork:
    """Build the network that a run's configuration describes.

    A registered network is wrapped in an `OwnNetwork`, which has the part of a SpikingNetwork's interface that training
    uses; `is_own` tells them apart.

    Raises:
        ValueError: the network was given as an object, which a configuration cannot build.
    """
    if model.name in NETWORKS:
        return cast(SpikingNetwork, OwnNetwork(NETWORKS[model.name](model), model.num_classes, model.name))
    if model.name.startswith(GIVEN):
        raise ValueError(
            f"the network {model.name.removeprefix(GIVEN)!r} was given to mf.train as an object, which no command can "
            "build; in Python, build it again and call mf.load_weights(network, run)"
        )
    return build_model(**vars(model), backend=backend)


def is_own(model: nn.Module) -> bool:
    """Return True for a network of the user, whose layers measurements and exports do not know."""
    return isinstance(model, OwnNetwork)


def require_known(model: nn.Module, what: str) -> None:
    """Refuse a network of the user; `what` is what needs to know its layers.

    Raises:
        ValueError: `model` is an `OwnNetwork`.
    """
    if isinstance(model, OwnNetwork):
        raise ValueError(f"{what} needs one of multifire's networks, whose layers it knows; {model.name} is your own")


def config_of_model(model: SpikingNetwork) -> ModelConfig:
    """Return the configuration from which `model_from_config` builds a network of this kind."""
    neuron = model.stem.neuron
    return ModelConfig(
        name=model.name,
        in_channels=model.in_channels,
        num_classes=model.num_classes,
        width=model.stem.conv.out_channels,
        levels=neuron.levels,
        thresholds=neuron.initial_thresholds,
        decay=neuron.initial_decay,
        surrogate=neuron.surrogate,
        surrogate_width=neuron.width,
        detach_reset=neuron.detach_reset,
        learn_thresholds=neuron.raw_thresholds is not None,
        learn_decay=neuron.raw_decay is not None,
        membranes=cast(Any, neuron.membranes),
        reset=cast(Any, neuron.reset),
        signed=neuron.signed,
        norm_input=model.input_norm is not None,
        checkpoint_stages=model.checkpoint_stages,
    )
