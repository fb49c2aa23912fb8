"""A plain stack of convolutions and neurons, without shortcuts."""

from collections.abc import Sequence

from torch import nn

from multifire.nn.block import ConvFire, MakeNeuron
from multifire.nn.bounds import bound_inputs
from multifire.nn.network import SpikePool, SpikingNetwork
from multifire.nn.neuron import MLF


class SpikingVGG(SpikingNetwork):
    """Spiking network without shortcuts: [T, N, C, H, W] -> logits [N, classes].

        3×3 layer of width w → stages of 3×3 layers, with 2×2 max pooling of spikes between them → pool → voting layer

    Args:
        stages: widths of the layers of each stage, as multiples of w.
        in_channels: C of the input.
        num_classes: size of the voting layer.
        width: w.
        norm_input: normalise the input by a threshold-dependent batch norm without γ and β.
        checkpoint_stages: less memory in training for a third more time; see `SpikingNetwork`.
        make_neuron: called once for each layer of neurons.

    Source of the layout: Simonyan and Zisserman, ICLR 2015, with one linear layer instead of three.
    """

    def __init__(
        self,
        stages: Sequence[Sequence[int]],
        *,
        in_channels: int = 3,
        num_classes: int = 10,
        width: int = 64,
        norm_input: bool = False,
        checkpoint_stages: bool = False,
        make_neuron: MakeNeuron = MLF,
    ):
        stem = ConvFire(in_channels, width, 3, 1, make_neuron())
        layers: list[list[nn.Module]] = []
        channels = width
        for number, factors in enumerate(stages):
            layers.append([SpikePool(2, 2)] if number else [])
            for factor in factors:
                layers[-1].append(ConvFire(channels, factor * width, 3, 1, make_neuron()))
                channels = factor * width
        super().__init__(
            stem,
            layers,
            channels,
            num_classes=num_classes,
            norm_input=norm_input,
            checkpoint_stages=checkpoint_stages,
            name=f"vgg{2 + sum(len(factors) for factors in stages)}",
        )
        bound_inputs(self.stem, [layer for stage in layers for layer in stage])
