"""Neuron, norm, convolution, residual blocks and networks as torch modules."""

from multifire.nn.block import ConvFire, ConvNorm, DSBlock, PlainBlock
from multifire.nn.conv import SpikeConv2d
from multifire.nn.memory import Kept, kept_for_backward
from multifire.nn.neuron import MLF, Stream, Streaming
from multifire.nn.norm import TdBatchNorm2d
from multifire.nn.resnet import SpikingResNet, StreamState, build_model, config_of_model, model_from_config

__all__ = [
    "MLF",
    "ConvFire",
    "ConvNorm",
    "DSBlock",
    "Kept",
    "PlainBlock",
    "SpikeConv2d",
    "SpikingResNet",
    "Stream",
    "StreamState",
    "Streaming",
    "TdBatchNorm2d",
    "build_model",
    "config_of_model",
    "kept_for_backward",
    "model_from_config",
]
