"""Let the trained digits network of the package classify the embedded test digits.

Shapes: T time steps, N samples, C channels, H rows, W columns, L classes.
"""

from typing import NamedTuple

import numpy as np
import torch

from multifire import datasets
from multifire.datasets.loader import make_batches
from multifire.export.shipped import shipped_run
from multifire.report import Run
from multifire.report.samples import running_probabilities
from multifire.training.load_run import load_run


class Showcase(NamedTuple):
    """What the network says, and what the analysis after its training found."""

    pictures: np.ndarray
    """Test digits uint8 [N, H, W], the first of each class."""
    probabilities: np.ndarray
    """Of each class, from the mean logits of the first t steps, [T, N, L]."""
    accuracy: float
    """On all test digits."""
    run: Run


@torch.inference_mode()
def classify_digits() -> Showcase:
    """Classify the test digits, and pick the first one of each class."""
    folder = shipped_run("digits")
    loaded = load_run(folder)
    data = datasets.load("digits")
    batches = make_batches(
        data.test, data.info, loaded.cfg.data, batch_size=250, device=torch.device("cpu"), shuffle=False
    )
    logits_TNL = torch.cat([loaded.model(x_TNCHW, per_step=True) for x_TNCHW, _ in batches.epoch(0)], 1)
    labels = data.test.labels
    picked = [int(np.flatnonzero(labels == label)[0]) for label in range(len(data.info.classes))]
    correct = logits_TNL.mean(0).argmax(1).numpy() == labels
    return Showcase(
        pictures=np.asarray(data.test.images)[picked, 0],
        probabilities=running_probabilities(logits_TNL[:, picked]).numpy(),
        accuracy=float(correct.mean()),
        run=Run(folder),
    )
