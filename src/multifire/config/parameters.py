"""Count the parameters of a configured network without building it."""

from multifire.config.architecture import Architecture, architecture, has_own_blocks, is_own_network
from multifire.config.schema import ModelConfig


def count_parameters(model: ModelConfig) -> int:
    """Return the number of parameters of the network that `build_model` builds for this configuration.

    For a network or blocks of one's own return 0: only their builder knows.
    """
    if is_own_network(model.name) or has_own_blocks(model.name):
        return 0
    found = architecture(model.name)
    stem = _conv_norm(model.in_channels, model.width, 7 if found.imagenet else 3)
    stages, channels = (_vgg if found.kind == "vgg" else _resnet)(found, model.width)
    learned = _layers_of_neurons(found) * (model.levels * model.learn_thresholds + model.learn_decay)
    return stem + stages + channels * model.num_classes + model.num_classes + learned


def _layers_of_neurons(found: Architecture) -> int:
    """Return the number of layers of neurons: of a residual network the stem's, two of each block, and more by kind."""
    if found.kind == "vgg":
        return 1 + sum(len(stage) for stage in found.stages)
    shortcuts = len(found.stages) - 1  # where shapes change
    further = {"plain": 0, "ms": 1, "ds": shortcuts, "sew": shortcuts}[found.kind]
    return 1 + 2 * sum(found.stages) + further


def _resnet(found: Architecture, width: int) -> tuple[int, int]:
    """Return the number of parameters of all stages, and the channels of the last one."""
    total, in_channels = 0, width
    for stage, blocks in enumerate(found.stages):
        out_channels = width * 2**stage
        total += _conv_norm(in_channels, out_channels, 3) + (2 * blocks - 1) * _conv_norm(out_channels, out_channels, 3)
        total += _conv_norm(in_channels, out_channels, 1) if in_channels != out_channels else 0
        in_channels = out_channels
    return total, in_channels


def _vgg(found: Architecture, width: int) -> tuple[int, int]:
    total, in_channels = 0, width
    for factor in (factor for stage in found.stages for factor in stage):
        total += _conv_norm(in_channels, factor * width, 3)
        in_channels = factor * width
    return total, in_channels


def _conv_norm(in_channels: int, out_channels: int, kernel: int) -> int:
    """Return the number of parameters of a convolution without bias and its norm."""
    return in_channels * out_channels * kernel * kernel + 2 * out_channels
