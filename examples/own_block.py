"""Train a network of residual blocks of one's own: dormant-suppressed, with a learned gate on the shortcut.

usage: python examples/own_block.py [OUT]
"""

import sys

import torch
from torch import Tensor, nn

import multifire as mf


@mf.register_block("gated")
class GatedBlock(mf.nn.Streaming):
    """Two layers of neurons, and a shortcut that is added after firing, times a learned number for each channel."""

    def __init__(self, in_channels, out_channels, stride, make_neuron):
        super().__init__()
        self.first = mf.nn.ConvFire(in_channels, out_channels, 3, stride, make_neuron())
        self.second = mf.nn.ConvFire(out_channels, out_channels, 3, 1, make_neuron())
        self.shortcut = mf.nn.ConvFire(in_channels, out_channels, 1, stride, make_neuron())
        self.gate = nn.Parameter(torch.ones(out_channels, 1, 1))

    def forward(self, x_TNCHW: Tensor, stream=None) -> Tensor:
        fired = self.second(self.first(x_TNCHW, stream), stream)
        return fired + torch.sigmoid(self.gate) * self.shortcut(x_TNCHW, stream)


def main() -> None:
    out = sys.argv[1] if len(sys.argv) > 1 else "runs/own-block"
    cfg = mf.recipe(
        "digits", **{"model.name": "gated_resnet8", "model.width": 8, "optim.epochs": 2, "data.limit": 1000}
    )
    run = mf.train(cfg, out)
    print(f"held-out accuracy {100 * run.accuracy:.1f} %")


if __name__ == "__main__":
    main()
