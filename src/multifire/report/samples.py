"""Predictions for single samples: mistakes, and recordings with the running prediction.

T time steps, N samples, L classes, C channels, H height, W width.
"""

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from multifire import datasets
from multifire.analysis import analyze
from multifire.analysis.evaluate import evaluate
from multifire.config import RunConfig
from multifire.datasets import EventSplit, Split
from multifire.datasets.loader import make_batches
from multifire.nn import SpikingNetwork, require_known
from multifire.training.checkpoint import load_model
from multifire.training.run_folder import RunFolder
from multifire.training.step import sum_of_losses
from multifire.utils import images
from multifire.utils.device import autocast, pick_device

SCORED_SAMPLES = 512
"""Test samples that are scored, evenly spread: a test set may be sorted by class."""
ANALYSED_SAMPLES = 128
"""Test samples on which the network is analysed."""
BATCH = 64
MISTAKES = 24
RECORDINGS = 6
MAX_STEPS = 1024
"""A network with more is not run for a page: its folder may come from a stranger."""


@dataclass(frozen=True)
class Sample:
    picture: str
    """PNG as a data URI; for a recording, its frames side by side."""
    label: int
    running: list[list[float]]
    """[T][L]: probability of each class from the mean logits of the first t steps."""
    frames: int = 1

    @property
    def predicted(self) -> int:
        return max(range(len(self.running[-1])), key=self.running[-1].__getitem__)


@dataclass(frozen=True)
class Samples:
    looked_at: int
    mistakes: list[Sample]
    """Wrong predictions with the highest probability."""
    recordings: list[Sample]
    """For events only: right and wrong predictions."""


def load(folder: Path, root: str | None) -> tuple[SpikingNetwork, RunConfig, datasets.Dataset]:
    """Load the network whose accuracy the run reports, and its data.

    Raises:
        FileNotFoundError: no checkpoint or no data.
        ValueError: a damaged checkpoint, or a network too large to run for a page.
    """
    run = RunFolder(folder)
    model, cfg = load_model(run.checkpoint(run.reported_checkpoint()))
    if cfg.data.timesteps > MAX_STEPS:
        raise ValueError(
            f"{cfg.data.timesteps} time steps are too many to run for a page, expected at most {MAX_STEPS}"
        )
    data = datasets.load(cfg.data.name, cfg.data.root if root is None else root, cfg.data)
    return model.to(pick_device("auto")), cfg, data


def spread(model: SpikingNetwork, cfg: RunConfig, data: datasets.Dataset, samples: int) -> tuple[Any, Any]:
    """Return this number of test samples, evenly spread, and their batches on the model's device."""
    test = data.test.pick(np.linspace(0, len(data.test) - 1, min(samples, len(data.test))).round().astype(np.int64))
    device = next(model.parameters()).device
    size = min(cfg.eval_batch_size, BATCH)
    return test, make_batches(test, data.info, cfg.data, batch_size=size, device=device, shuffle=False)


def measure(model: SpikingNetwork, cfg: RunConfig, data: datasets.Dataset) -> dict[str, Any]:
    """Return the record of analysis.json, measured on a few test samples; the scores are of more samples."""
    require_known(model, "an analysis")
    scored = evaluate(model, spread(model, cfg, data, SCORED_SAMPLES)[1], cfg.precision)
    batches = list(spread(model, cfg, data, ANALYSED_SAMPLES)[1].epoch(0))
    found = analyze(
        model, batches, loss=partial(sum_of_losses, optim=cfg.optim), precision=cfg.precision, scored=scored
    )
    checkpoint = "best by validation" if cfg.data.validation else "last"
    return {"split": "test", "checkpoint": checkpoint, **found.record()}


@torch.no_grad()
def look(model: SpikingNetwork, cfg: RunConfig, data: datasets.Dataset) -> Samples:
    """Return predictions for some test samples: mistakes and, for events, recordings."""
    device = next(model.parameters()).device
    test, batches = spread(model, cfg, data, SCORED_SAMPLES)
    running, labels = [], []
    for x_TNCHW, y in batches.epoch(0):
        with autocast(device, cfg.precision):
            logits_TNL = model(x_TNCHW, per_step=True)
        running.append(running_probabilities(logits_TNL.float()).cpu())
        labels.append(y.cpu())
    running_TNL, labels_N = torch.cat(running, 1), torch.cat(labels)
    probability_N, predicted_N = running_TNL[-1].max(1)
    wrong_N = predicted_N != labels_N
    surest = probability_N.argsort(descending=True, stable=True)
    wrong, right = surest[wrong_N[surest]].tolist(), (~wrong_N).nonzero()[:, 0].tolist()

    def samples(chosen: Sequence[int], moving: bool) -> list[Sample]:
        return [_sample(test, i, int(labels_N[i]), running_TNL[:, i], moving) for i in chosen]

    half = RECORDINGS // 2
    shown = right[:half] + wrong[:half] + right[half:] + wrong[half:] if data.info.events else []
    return Samples(len(labels_N), samples(wrong[:MISTAKES], False), samples(shown[:RECORDINGS], True))


def running_probabilities(logits_TNL: Tensor) -> Tensor:
    """Return the softmax of the mean logits of the first t steps, for t = 1..T."""
    steps_T11 = torch.arange(1, len(logits_TNL) + 1, device=logits_TNL.device)[:, None, None]
    return (logits_TNL.cumsum(0) / steps_T11).softmax(2)


def _sample(test: Split | EventSplit, index: int, label: int, running_TK: Tensor, moving: bool) -> Sample:
    running = [[round(p, 4) for p in step] for step in running_TK.tolist()]
    if isinstance(test, Split):
        return Sample(_uri(images.encode_photo(test.images[index])), label, running)
    frames_TCHW = np.asarray(test.frames[test.rows[index]])
    if not moving:
        return Sample(_uri(images.encode_png(images.paint(frames_TCHW.sum(0, dtype=np.int64))[None])), label, running)
    painted_THW = images.paint(frames_TCHW)
    return Sample(_uri(images.encode_png(np.concatenate(list(painted_THW), 1)[None])), label, running, len(painted_THW))


def _uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()
