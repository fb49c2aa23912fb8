"""Train a network of one's own in multifire's trainer: any module from frames to the logits of each time step.

usage: python examples/own_network.py [OUT]
"""

import sys

from torch import Tensor, nn

import multifire as mf


class TwoLayers(nn.Module):
    """Two layers of convolution, norm and neurons, and a linear readout at every time step."""

    def __init__(self, classes: int):
        super().__init__()
        self.layers = nn.Sequential(mf.nn.ConvFire(1, 8, 3, 2, mf.nn.MLF()), mf.nn.ConvFire(8, 16, 3, 2, mf.nn.MLF()))
        self.readout = nn.Linear(16, classes)

    def forward(self, x_TNCHW: Tensor) -> Tensor:
        return self.readout(self.layers(x_TNCHW).mean((3, 4)))


def main() -> None:
    out = sys.argv[1] if len(sys.argv) > 1 else "runs/own-network"
    cfg = mf.recipe("digits", **{"optim.epochs": 2, "data.limit": 1000})
    run = mf.train(cfg, out, network=TwoLayers(classes=10))
    print(f"held-out accuracy {100 * run.accuracy:.1f} %")


if __name__ == "__main__":
    main()
