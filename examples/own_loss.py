"""Train with a loss and an optimiser of one's own.

usage: python examples/own_loss.py [OUT]
"""

import sys

import torch
import torch.nn.functional as F
from torch import Tensor

import multifire as mf


def late_steps_count_more(logits_TNL: Tensor, y_N: Tensor) -> Tensor:
    """Return the mean cross entropy, in which time step t has the weight t."""
    weights_T = torch.arange(1.0, len(logits_TNL) + 1, device=y_N.device)
    losses_T = torch.stack([F.cross_entropy(logits_NL, y_N) for logits_NL in logits_TNL])
    return (weights_T * losses_T).sum() / weights_T.sum()


def main() -> None:
    out = sys.argv[1] if len(sys.argv) > 1 else "runs/own-loss"
    cfg = mf.recipe("digits", **{"optim.epochs": 2, "model.width": 4, "data.limit": 1000})
    run = mf.train(
        cfg,
        out,
        loss=late_steps_count_more,
        optimizer=lambda parameters: torch.optim.NAdam(parameters, 2e-3),
        on_epoch=lambda record: print(f"loss after epoch {record['epoch'] + 1}: {record['train_loss']:.3f}"),
    )
    print(f"held-out accuracy {100 * run.accuracy:.1f} %")


if __name__ == "__main__":
    main()
