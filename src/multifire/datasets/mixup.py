"""Mixup: train on weighted means of two images and of their labels.

Source: Zhang et al., "mixup: beyond empirical risk minimization", ICLR 2018.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from multifire.datasets.augment import Draws


@dataclass(frozen=True, eq=False)
class MixedLabels:
    """Two labels for each sample: the loss is weight · loss(labels) + (1 - weight) · loss(others)."""

    labels: Tensor
    """int64 [N]."""
    others: Tensor
    """int64 [N]."""
    weight: Tensor
    """Weight of `labels`, float32 [N]."""

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: slice | Tensor) -> "MixedLabels":
        return MixedLabels(self.labels[index], self.others[index], self.weight[index])

    @property
    def device(self) -> torch.device:
        """Device of the labels."""
        return self.labels.device

    def soft(self, classes: int) -> Tensor:
        """Return the probabilities of the classes, float32 [N, classes], as torch's cross_entropy takes them."""
        soft = torch.zeros(len(self), classes, device=self.device)
        soft.scatter_add_(1, self.labels[:, None], self.weight[:, None])
        return soft.scatter_add_(1, self.others[:, None], 1 - self.weight[:, None])


def draw_mixup(draws: Draws, alpha: float) -> tuple[Tensor, float]:
    """Return the partner of each sample, a random order [N] of the batch, and the weight, from Beta(alpha, alpha)."""
    partner_N = draws.uniform(0, 1).argsort()
    return partner_N, draw_beta(draws, alpha)


def draw_beta(draws: Draws, alpha: float) -> float:
    """Draw from Beta(alpha, alpha), 0 < alpha <= 1.

    Source: Jöhnk, "Erzeugung von betaverteilten und gammaverteilten Zufallszahlen", Metrika 8, 1964.
    """
    while True:  # at least half of all pairs are accepted
        x, y = draws.uniform(0, 1) ** (1 / alpha), draws.uniform(0, 1) ** (1 / alpha)
        accepted = torch.nonzero((x + y <= 1) & (x + y > 0))
        if len(accepted):
            first = accepted[0, 0]
            return (x[first] / (x[first] + y[first])).item()


def mix(x_NCHW: Tensor, labels_N: Tensor, partner_N: Tensor, weight: float) -> tuple[Tensor, MixedLabels]:
    """Return weight · x + (1 - weight) · x[partner], and both labels.

    Args:
        x_NCHW: images as numbers.
        labels_N: their classes.
        partner_N: position of each sample's partner, on the same device.
        weight: 0 to 1.
    """
    mixed_NCHW = torch.lerp(x_NCHW[partner_N], x_NCHW, weight)
    weight_N = torch.full(labels_N.shape, weight, dtype=torch.float32, device=labels_N.device)
    return mixed_NCHW, MixedLabels(labels_N, labels_N[partner_N], weight_N)
