"""Fine-tune trained weights on other classes: keep all layers but the last.

usage: python examples/transfer.py RUN [OUT]     RUN: a run folder of `multifire train digits`
"""

import dataclasses
import sys
from pathlib import Path

import numpy as np
from torch import nn

import multifire as mf


def main() -> None:
    run, out = Path(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else "runs/transfer"
    cfg = mf.Run(run).config
    network = mf.nn.model_from_config(cfg.model)
    mf.load_weights(network, run)
    for parameter in network.parameters():
        parameter.requires_grad_(False)
    network.voting = nn.Linear(network.voting.in_features, 2)  # a new last layer, which learns
    network.num_classes = 2
    digits = mf.datasets.load("digits")
    train, test = (
        dataclasses.replace(split, labels=np.int64(split.labels % 2)) for split in (digits.train, digits.test)
    )
    info = dataclasses.replace(digits.info, classes=("even", "odd"))
    data = dataclasses.replace(digits, train=train, test=test, info=info)
    cfg = dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, num_classes=2))
    cfg = dataclasses.replace(cfg, optim=dataclasses.replace(cfg.optim, epochs=1))
    print(f"odd or even: {100 * mf.train(cfg, out, network=network, data=data).accuracy:.1f} %")


if __name__ == "__main__":
    main()
