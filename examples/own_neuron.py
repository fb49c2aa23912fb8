"""Train with a surrogate of one's own, and with thresholds and decay that learn.

usage: python examples/own_neuron.py [OUT]
"""

import sys

import torch
from torch import Tensor

import multifire as mf


@mf.register_surrogate("cosine")
def cosine(v: Tensor, width: float) -> Tensor:
    """Derivative of a spike: one arch of a cosine, 0 outside |v| < width."""
    return torch.cos(torch.pi / 2 * v / width).clamp_min(0) * (v.abs() < width) * torch.pi / (4 * width)


def main() -> None:
    out = sys.argv[1] if len(sys.argv) > 1 else "runs/own-neuron"
    cfg = mf.recipe(
        "digits",
        **{
            "model.surrogate": "cosine",
            "model.learn_thresholds": True,
            "model.learn_decay": True,
            "model.width": 8,
            "optim.epochs": 2,
        },
    )
    run = mf.train(cfg, out)
    print(f"held-out accuracy {100 * run.accuracy:.1f} %")


if __name__ == "__main__":
    main()
