"""The number of parameters of a configured network, without building it."""

from multifire.config.architecture import parse_model_name
from multifire.config.schema import ModelConfig


def count_parameters(model: ModelConfig) -> int:
    """Return the number of parameters of the network that `build_model` builds for this configuration."""
    blocks = parse_model_name(model.name)[1]
    channels = [model.width, 2 * model.width, 4 * model.width]
    total = _conv_norm(model.in_channels, model.width, 3)
    before = model.width
    for after in channels:
        total += _conv_norm(before, after, 3) + (2 * blocks - 1) * _conv_norm(after, after, 3)
        total += _conv_norm(before, after, 1) if before != after else 0
        before = after
    return total + before * model.num_classes + model.num_classes


def _conv_norm(before: int, after: int, kernel: int) -> int:
    return before * after * kernel * kernel + 2 * after
