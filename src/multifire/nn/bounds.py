"""The largest activation that can reach each convolution, which decides in how many bits a GPU packs its input."""

from collections.abc import Iterable

from torch import nn

from multifire.nn.block import ConvFire, DSBlock, PlainBlock
from multifire.nn.conv import SpikeConv2d
from multifire.nn.network import SpikePool


def bound_inputs(stem: ConvFire, layers: Iterable[nn.Module]) -> None:
    """Tell each convolution behind neurons the largest activation that can reach it; neurons of K levels give 0..K.

    A plain block gives 0..K too. A dormant-suppressed block adds its shortcut after firing: K more than its input may
    be, or 2K if the shortcut fires.
    """
    if stem.neuron.signed:  # values -K..K are kept unpacked
        return
    largest = _levels(stem)
    for block in layers:
        if isinstance(block, SpikePool):
            continue
        if isinstance(block, ConvFire):
            _set_max_input(block.conv, largest)
            largest = _levels(block)
            continue
        if not isinstance(block, DSBlock | PlainBlock):  # unknown from here on
            return
        _set_max_input(block.fire1.conv, largest)
        _set_max_input(block.fire2.conv, _levels(block.fire1))
        if block.shortcut is not None:
            _set_max_input(block.shortcut.conv, largest)
        added = 0
        if isinstance(block, DSBlock):
            added = largest if block.shortcut is None else _levels(block.shortcut)
        largest = _levels(block.fire2) + added


def _levels(layer: ConvFire) -> int:
    return layer.neuron.levels


def _set_max_input(conv: nn.Conv2d, largest: int) -> None:
    if isinstance(conv, SpikeConv2d):
        conv.max_input = largest
