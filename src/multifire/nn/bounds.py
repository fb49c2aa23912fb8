"""The largest activation that can reach each convolution, which decides in how many bits a GPU packs its input."""

from collections.abc import Iterable
from typing import TypeGuard

from torch import nn

from multifire.nn.block import ConvFire, DSBlock, PlainBlock
from multifire.nn.conv import SpikeConv2d
from multifire.nn.network import SpikePool
from multifire.nn.neuron import MLF


def bound_inputs(stem: ConvFire, layers: Iterable[nn.Module]) -> None:
    """Tell each convolution behind neurons the largest activation that can reach it; neurons of K levels give 0..K.

    A plain block gives 0..K too. A dormant-suppressed block adds its shortcut after firing: K more than its input may
    be, or 2K if the shortcut fires.
    """
    layers = list(layers)
    if any(neuron.signed for layer in (stem, *layers) for neuron in layer.modules() if isinstance(neuron, MLF)):
        return  # values -K..K are kept unpacked
    largest = _levels(stem)
    for block in layers:
        if isinstance(block, SpikePool):
            continue
        if isinstance(block, ConvFire):
            _set_max_input(block.conv, largest)
            largest = _levels(block)
            continue
        if not is_ds_or_plain(block):  # unknown from here on
            return
        _set_max_input(block.fire1.conv, largest)
        _set_max_input(block.fire2.conv, _levels(block.fire1))
        if block.shortcut is not None:
            _set_max_input(block.shortcut.conv, largest)
        added = 0
        if isinstance(block, DSBlock):
            added = largest if block.shortcut is None else _levels(block.shortcut)
        largest = _levels(block.fire2) + added


def is_ds_or_plain(block: nn.Module) -> TypeGuard[DSBlock | PlainBlock]:
    """Return True for blocks that compute what `DSBlock` or `PlainBlock` does; a block of the user may not."""
    return isinstance(block, DSBlock | PlainBlock) and type(block).forward in (DSBlock.forward, PlainBlock.forward)


def _levels(layer: ConvFire) -> int:
    return layer.neuron.levels


def _set_max_input(conv: nn.Conv2d, largest: int) -> None:
    if isinstance(conv, SpikeConv2d):
        conv.max_input = largest
