"""What all networks of multifire share: stem, stages, voting layer, streaming, and checkpointed stages."""

import contextlib
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from multifire.nn.block import ConvFire
from multifire.nn.neuron import MLF, Membranes, Stream
from multifire.nn.norm import TdBatchNorm2d


class StreamState(NamedTuple):
    """State of a stream between two frames: membranes of all layers, sum of the logits, number of steps so far."""

    membranes: Membranes
    logit_sum: Tensor
    steps: int


class SpikingNetwork(nn.Module):
    """Spiking network: [T, N, C, H, W] -> logits [N, classes].

        input norm → stem → stages of layers or blocks → last neurons → global average pool → linear voting layer → mean

    Args:
        stem: the first layer of neurons.
        stages: the layers of each stage, called as layer(x, stream).
        channels: C of the last stage's output.
        num_classes: size of the voting layer.
        norm_input: normalise the input by a threshold-dependent batch norm (tdBN) without γ and β.
        checkpoint_stages: in training, keep only the inputs of the stages and compute the rest again in the backward
            pass: a third more time for a fraction of the memory.
        last: neurons behind the last stage, if its output is currents.
        name: name of the network, such as "ds_resnet20".
    """

    def __init__(
        self,
        stem: ConvFire,
        stages: Sequence[Sequence[nn.Module]],
        channels: int,
        *,
        num_classes: int,
        norm_input: bool,
        checkpoint_stages: bool,
        last: MLF | None = None,
        name: str,
    ):
        super().__init__()
        self.name = name
        self.checkpoint_stages = checkpoint_stages
        self.in_channels, self.num_classes = stem.conv.in_channels, num_classes
        neuron = stem.neuron
        v_threshold = neuron.initial_thresholds[0]
        norm = partial(TdBatchNorm2d, self.in_channels, v_threshold, affine=False, backend=neuron.backend)
        self.input_norm = norm() if norm_input else None
        self.stem = stem
        self.stages = nn.ModuleList(nn.ModuleList(stage) for stage in stages)
        self.last = last
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
            ValueError: the network is in training mode, or the state is of another network.
        """
        if self.training:
            raise ValueError(
                "step() needs evaluation mode, in which norms use running statistics; call model.eval() first"
            )
        stream = Stream(self, state and state.membranes)
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
        if self.last is not None:
            x_TNCHW = self.last(x_TNCHW, stream)
        return self.voting(_pool(x_TNCHW))


class SpikePool(nn.Module):
    """The largest of neighbouring spikes, [T, N, C, H, W]: max pooling, which keeps integers."""

    def __init__(self, kernel: int, stride: int):
        super().__init__()
        self.kernel, self.stride = kernel, stride

    def forward(self, x_TNCHW: Tensor, _stream: Stream | None = None) -> Tensor:
        pooled = F.max_pool2d(x_TNCHW.flatten(0, 1), self.kernel, self.stride, padding=(self.kernel - 1) // 2)
        return pooled.unflatten(0, x_TNCHW.shape[:2])


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
    # Nothing is random, and a CUDA graph cannot read the state of the random numbers.
    options = {"use_reentrant": False, "preserve_rng_state": False, **context}
    return cast(Tensor, checkpoint(_run_stage, stage, x_TNCHW, None, **options))


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
