"""The spiking residual network, and its builder."""

import contextlib
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from multifire import ops
from multifire.config import ModelConfig
from multifire.config.architecture import parse_model_name
from multifire.nn.block import BLOCKS, ConvFire, MakeNeuron
from multifire.nn.neuron import MLF, Membranes, Stream
from multifire.nn.norm import TdBatchNorm2d
from multifire.utils.errors import unknown


class StreamState(NamedTuple):
    """State of a stream between two frames: membranes of all layers, sum of the logits, number of steps so far."""

    membranes: Membranes
    logit_sum: Tensor
    steps: int


class SpikingResNet(nn.Module):
    """Spiking residual network: [T, N, C, H, W] -> logits [N, classes].

        stem → three stages of blocks, widths w, 2w, 4w → global average pool → linear voting layer → mean over time

    Args:
        block: "ds" or "plain", the kind of residual block.
        blocks_per_stage: n; the depth is 6n + 2.
        in_channels: C of the input.
        num_classes: size of the voting layer.
        width: w, channels of the first stage.
        norm_input: normalise the input by a threshold-dependent batch norm (tdBN) without γ and β.
        checkpoint_stages: in training, keep only the inputs of the stages and compute the rest again in the backward
            pass: a third more time for a fraction of the memory.
        make_neuron: called once for each layer of neurons.

    Source: Feng et al., IJCAI 2022, section 4 and table 1.
    """

    def __init__(
        self,
        block: str = "ds",
        blocks_per_stage: int = 3,
        *,
        in_channels: int = 3,
        num_classes: int = 10,
        width: int = 64,
        norm_input: bool = False,
        checkpoint_stages: bool = False,
        make_neuron: MakeNeuron = MLF,
    ):
        super().__init__()
        self.checkpoint_stages = checkpoint_stages
        self.in_channels, self.num_classes = in_channels, num_classes
        neuron = make_neuron()
        norm = partial(TdBatchNorm2d, in_channels, neuron.thresholds[0], affine=False, backend=neuron.backend)
        self.input_norm = norm() if norm_input else None
        self.stem = ConvFire(in_channels, width, 3, 1, neuron)
        stages, channels = [], width
        for stage in range(3):
            out_channels = width * 2**stage
            shapes = [(channels, 1 if stage == 0 else 2), *[(out_channels, 1)] * (blocks_per_stage - 1)]
            stages.append(
                nn.ModuleList(BLOCKS[block](first, out_channels, stride, make_neuron) for first, stride in shapes)
            )
            channels = out_channels
        self.stages = nn.ModuleList(stages)
        self.voting = nn.Linear(channels, num_classes)
        nn.init.kaiming_normal_(self.voting.weight)

    def forward(self, x_TNCHW: Tensor, *, per_step: bool = False) -> Tensor:
        """Return logits [N, classes], averaged over time; with `per_step`, of each time step [T, N, classes].

        Raises:
            ValueError: x is not [T, N, in_channels, H, W].
        """
        logits_TNL = self._logits(x_TNCHW, None)
        return logits_TNL if per_step else logits_TNL.mean(0)

    @torch.no_grad()
    def step(self, frame_NCHW: Tensor, state: StreamState | None = None) -> tuple[Tensor, StreamState]:
        """Compute one time step of a stream, in evaluation mode.

        T steps from state None end with the logits of one call on the T frames.

        Args:
            frame_NCHW: one frame [N, C, H, W].
            state: state of the step before; None at the first step.

        Returns:
            The mean logits [N, classes] of the frames so far, and the state for the next step.

        Raises:
            ValueError: the network is in training mode, or the state is of another number of layers.
        """
        if self.training:
            raise ValueError(
                "step() needs evaluation mode, in which norms use running statistics; call model.eval() first"
            )
        stream = Stream(state and state.membranes)
        logits = self._logits(frame_NCHW.unsqueeze(0), stream)[0]
        logit_sum, steps = (logits, 1) if state is None else (state.logit_sum + logits, state.steps + 1)
        return logit_sum / steps, StreamState(stream.after(), logit_sum, steps)

    def _logits(self, x_TNCHW: Tensor, stream: Stream | None) -> Tensor:
        if x_TNCHW.dim() != 5 or x_TNCHW.shape[2] != self.in_channels:
            raise ValueError(
                f"input has shape {tuple(x_TNCHW.shape)}, expected [T, N, {self.in_channels}, H, W]: "
                "time first, then the batch"
            )
        if self.input_norm is not None:
            x_TNCHW = self.input_norm(x_TNCHW)
        x_TNCHW = self.stem(x_TNCHW, stream)
        for stage in self.stages:
            if self.checkpoint_stages and self.training and torch.is_grad_enabled():
                x_TNCHW = _checkpointed(stage, x_TNCHW)
            else:
                x_TNCHW = _run_stage(stage, x_TNCHW, stream)
        return self.voting(_pool(x_TNCHW))


def _pool(x_TNCHW: Tensor) -> Tensor:
    """Return the mean over rows and columns; permuted first, so that the gradient is channels-last."""
    return x_TNCHW.permute(0, 1, 3, 4, 2).mean((2, 3))


def _run_stage(stage: nn.Module, x_TNCHW: Tensor, stream: Stream | None) -> Tensor:
    for block in stage.children():
        x_TNCHW = block(x_TNCHW, stream)
    return x_TNCHW


def _checkpointed(stage: nn.Module, x_TNCHW: Tensor) -> Tensor:
    """Run the stage so that autograd keeps only its input, and computes the rest again in the backward pass."""
    # A compiled graph updates running statistics in the forward pass only, and needs no context.
    context: dict[str, Any] = {} if torch.compiler.is_compiling() else {"context_fn": partial(_contexts, stage)}
    return cast(Tensor, checkpoint(_run_stage, stage, x_TNCHW, None, use_reentrant=False, **context))


def _contexts(stage: nn.Module) -> tuple[contextlib.AbstractContextManager, contextlib.AbstractContextManager]:
    """Return the contexts of a stage's first and second computation."""
    return contextlib.nullcontext(), _frozen_statistics(stage)


@contextlib.contextmanager
def _frozen_statistics(stage: nn.Module) -> Iterator[None]:
    """Keep the running statistics: the second computation of a batch must not update them again."""
    norms = [module for module in stage.modules() if isinstance(module, TdBatchNorm2d)]
    saved = [norm.momentum for norm in norms]
    try:
        for norm in norms:
            norm.momentum = 0.0
        yield
    finally:
        for norm, momentum in zip(norms, saved, strict=True):
            norm.momentum = momentum


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
    norm_input: bool = False,
    checkpoint_stages: bool = False,
    backend: str = "auto",
) -> SpikingResNet:
    """Build a network by name: ds_resnet{6n+2} or plain_resnet{6n+2}.

    Args:
        name: kind of block and depth.
        in_channels: channels of a frame.
        num_classes: size of the voting layer.
        width: channels of the first stage.
        levels: K, firing levels of a neuron.
        thresholds: θ, one for each level (default: 0.6, 0.6 + a, 0.6 + 2a, ... for surrogate width a).
        decay: factor of the membrane from one time step to the next.
        surrogate: a name in `multifire.ops.reference.SURROGATES`: "rect", "triangle" or "atan".
        surrogate_width: width a of the surrogate.
        detach_reset: no gradient through the spikes in the reset; see `MLF`.
        norm_input: normalise the input by a tdBN without γ and β.
        checkpoint_stages: less memory in training for a third more time; see `SpikingResNet`.
        backend: "auto" or a name in `multifire.ops.BACKENDS`.

    Raises:
        ValueError: another name, thresholds that are not one for each level, or an unknown backend.
    """
    block, blocks_per_stage = parse_model_name(name)
    if thresholds is None:
        thresholds = ops.default_thresholds(levels, width=surrogate_width)
    if len(thresholds) != levels or levels < 1:
        raise ValueError(f"thresholds is {thresholds}, expected one for each of levels = {levels} >= 1")
    if backend not in ("auto", *ops.BACKENDS):
        raise unknown("backend", backend, ["auto", *ops.BACKENDS])
    make_neuron = partial(
        MLF, thresholds, decay, surrogate=surrogate, width=surrogate_width, detach_reset=detach_reset, backend=backend
    )
    return SpikingResNet(
        block,
        blocks_per_stage,
        in_channels=in_channels,
        num_classes=num_classes,
        width=width,
        norm_input=norm_input,
        checkpoint_stages=checkpoint_stages,
        make_neuron=make_neuron,
    )


def model_from_config(model: ModelConfig, backend: str = "auto") -> SpikingResNet:
    """Build the network that a run's configuration describes."""
    return build_model(**vars(model), backend=backend)


def config_of_model(model: SpikingResNet) -> ModelConfig:
    """Return the configuration from which `model_from_config` builds a network of this kind."""
    first = next(iter(model.stages[0].children()))
    kind = next(name for name, block in BLOCKS.items() if isinstance(first, block))
    neuron = model.stem.neuron
    return ModelConfig(
        name=f"{kind}_resnet{6 * len(list(model.stages[0].children())) + 2}",
        in_channels=model.in_channels,
        num_classes=model.num_classes,
        width=model.stem.conv.out_channels,
        levels=len(neuron.thresholds),
        thresholds=neuron.thresholds,
        decay=neuron.decay,
        surrogate=neuron.surrogate,  # pyright: ignore[reportArgumentType] - one of SURROGATES
        surrogate_width=neuron.width,
        detach_reset=neuron.detach_reset,
        norm_input=model.input_norm is not None,
        checkpoint_stages=model.checkpoint_stages,
    )
