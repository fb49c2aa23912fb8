"""Neuron, norm, convolution, residual blocks and networks as torch modules."""

from multifire.nn.block import ConvFire, ConvNorm, DSBlock, PlainBlock
from multifire.nn.conv import SpikeConv2d
from multifire.nn.memory import Kept, kept_for_backward
from multifire.nn.network import SpikePool, SpikingNetwork, StreamState
from multifire.nn.neuron import ILIF, MLF, MSF, Stream, Streaming, Ternary
from multifire.nn.norm import TdBatchNorm2d
from multifire.nn.other_blocks import MSBlock, SEWBlock
from multifire.nn.own import OwnNetwork, register_network
from multifire.nn.resnet import (
    SpikingResNet,
    build_model,
    config_of_model,
    is_own,
    model_from_config,
    register_block,
    require_known,
)
from multifire.nn.vgg import SpikingVGG

__all__ = [
    "ILIF",
    "MLF",
    "MSF",
    "ConvFire",
    "ConvNorm",
    "DSBlock",
    "Kept",
    "MSBlock",
    "OwnNetwork",
    "PlainBlock",
    "SEWBlock",
    "SpikeConv2d",
    "SpikePool",
    "SpikingNetwork",
    "SpikingResNet",
    "SpikingVGG",
    "Stream",
    "StreamState",
    "Streaming",
    "TdBatchNorm2d",
    "Ternary",
    "build_model",
    "config_of_model",
    "is_own",
    "kept_for_backward",
    "model_from_config",
    "register_block",
    "register_network",
    "require_known",
]
