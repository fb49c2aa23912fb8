"""The paper's residual network with ReLU in place of spiking neurons: what the same images and recipe allow.

Shapes: x_TNCHW is [time, sample, channel, row, column]; every time step is computed by itself.
"""

import torch
from torch import Tensor, nn

from multifire.config import ModelConfig
from multifire.nn import register_network

BLOCKS_PER_STAGE = 3


class Layer(nn.Sequential):
    """y = ReLU(BN(conv(x))), the counterpart of `ConvFire`."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int, stride: int):
        conv = nn.Conv2d(in_channels, out_channels, kernel, stride, kernel // 2, bias=False)
        nn.init.kaiming_normal_(conv.weight)
        conv.weight.data = conv.weight.data.contiguous(memory_format=torch.channels_last)
        super().__init__(conv, nn.BatchNorm2d(out_channels), nn.ReLU(inplace=True))


class Block(nn.Module):
    """y = ReLU(F₂(ReLU(F₁(x)))) + shortcut(x), F = BN∘conv3×3: the counterpart of `DSBlock`."""

    def __init__(self, in_channels: int, out_channels: int, stride: int):
        super().__init__()
        self.layers = nn.Sequential(
            Layer(in_channels, out_channels, 3, stride), Layer(out_channels, out_channels, 3, 1)
        )
        same = in_channels == out_channels and stride == 1
        self.shortcut = nn.Identity() if same else Layer(in_channels, out_channels, 1, stride)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        return self.layers(x_NCHW) + self.shortcut(x_NCHW)


class ReluResNet(nn.Module):
    """x [T, N, C, H, W] -> logits of each time step [T, N, L], with the parameters of `ds_resnet20`."""

    def __init__(self, in_channels: int, num_classes: int, width: int):
        super().__init__()
        self.stem = Layer(in_channels, width, 3, 1)
        blocks: list[Block] = []
        channels = width
        for stage in range(3):
            for block in range(BLOCKS_PER_STAGE):
                blocks.append(Block(channels, width * 2**stage, 2 if stage > 0 and block == 0 else 1))
                channels = width * 2**stage
        self.blocks = nn.Sequential(*blocks)
        self.voting = nn.Linear(channels, num_classes)

    def forward(self, x_TNCHW: Tensor) -> Tensor:
        x_NCHW = x_TNCHW.flatten(0, 1).contiguous(memory_format=torch.channels_last)
        logits_NL = self.voting(self.blocks(self.stem(x_NCHW)).mean((2, 3)))
        return logits_NL.unflatten(0, x_TNCHW.shape[:2])


@register_network("relu_resnet20")
def relu_resnet20(model: ModelConfig) -> nn.Module:
    """Return the network for `--model.name relu_resnet20`."""
    return ReluResNet(model.in_channels, model.num_classes, model.width)
