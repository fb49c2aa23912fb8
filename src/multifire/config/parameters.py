"""Count the parameters of a configured network without building it."""

from multifire.config.architecture import parse_model_name
from multifire.config.schema import ModelConfig


def count_parameters(model: ModelConfig) -> int:
    """Return the number of parameters of the network that `build_model` builds for this configuration."""
    blocks = parse_model_name(model.name)[1]
    channels = [model.width, 2 * model.width, 4 * model.width]
    total = _conv_norm(model.in_channels, model.width, 3)
    in_channels = model.width
    for out_channels in channels:
        total += _conv_norm(in_channels, out_channels, 3)
        total += (2 * blocks - 1) * _conv_norm(out_channels, out_channels, 3)
        total += _conv_norm(in_channels, out_channels, 1) if in_channels != out_channels else 0
        in_channels = out_channels
    return total + in_channels * model.num_classes + model.num_classes


def _conv_norm(in_channels: int, out_channels: int, kernel: int) -> int:
    """Return the number of parameters of a convolution without bias and its norm."""
    return in_channels * out_channels * kernel * kernel + 2 * out_channels
