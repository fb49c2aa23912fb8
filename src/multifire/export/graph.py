"""Translate a folded network into the few operations of an exchange format.

Exchange formats have neither MLF neurons nor residual blocks. Each format implements a few operations as a `Target`,
and `trace` calls them in order of computation.
"""

from typing import Protocol, TypeVar

from torch import Tensor, nn

from multifire.export.fold import FoldedFire, Shift
from multifire.nn import MLF, DSBlock, PlainBlock, SpikingNetwork
from multifire.nn.bounds import is_ds_or_plain

Value = TypeVar("Value")


class Target(Protocol[Value]):
    """The operations of a format on one time step [N, C, H, W]. `name` is the dotted name of the module."""

    def shift(self, x: Value, mean: Tensor, name: str) -> Value:
        """Return x - mean, per channel."""
        ...

    def conv(self, x: Value, conv: nn.Conv2d, name: str) -> Value:
        """Return the convolution of x, with its bias."""
        ...

    def fire(self, current: Value, neuron: MLF, name: str) -> Value:
        """Return the neuron's spikes; the target keeps the membranes between time steps."""
        ...

    def add(self, a: Value, b: Value, name: str) -> Value:
        """Return a + b."""
        ...

    def vote(self, x: Value, voting: nn.Linear, name: str) -> Value:
        """Return the logits [N, classes]: the voting layer of the mean over rows and columns."""
        ...


def trace(model: SpikingNetwork, x: Value, to: Target[Value]) -> Value:
    """Call the operations of a target for one time step of a folded network; return the logits."""
    if isinstance(model.input_norm, Shift):
        x = to.shift(x, model.input_norm.mean, "input_norm")
    x = to.fire(_current(x, model.stem, "stem", to), model.stem.neuron, "stem.neuron")
    for stage, blocks in enumerate(model.stages):
        for number, block in enumerate(blocks.children()):
            x = _trace_block(x, block, f"stages.{stage}.{number}", to)
    return to.vote(x, model.voting, "voting")


def _trace_block(x: Value, block: nn.Module, name: str, to: Target[Value]) -> Value:
    if not is_ds_or_plain(block):
        raise ValueError(
            f"{name} is a {type(block).__name__}, which the format cannot hold; expected ds or plain blocks"
        )
    residual = x
    if isinstance(block, DSBlock) and block.shortcut is not None:
        residual = _fire(x, block.shortcut, f"{name}.shortcut", to)
    elif block.shortcut is not None:
        residual = _current(x, block.shortcut, f"{name}.shortcut", to)
    x = _fire(x, block.fire1, f"{name}.fire1", to)
    current = _current(x, block.fire2, f"{name}.fire2", to)
    if isinstance(block, PlainBlock):
        current = to.add(current, residual, f"{name}.add")
    spikes = to.fire(current, block.fire2.neuron, f"{name}.fire2.neuron")
    return to.add(spikes, residual, f"{name}.add") if isinstance(block, DSBlock) else spikes


def _fire(x: Value, layer: nn.Module, name: str, to: Target[Value]) -> Value:
    assert isinstance(layer, FoldedFire)
    return to.fire(_current(x, layer, name, to), layer.neuron, f"{name}.neuron")


def _current(x: Value, layer: nn.Module, name: str, to: Target[Value]) -> Value:
    assert isinstance(layer.conv, nn.Conv2d)
    return to.conv(x, layer.conv, f"{name}.conv")
