"""What a network scores: loss, accuracy, accuracy of each class, and accuracy after each time step."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from multifire import datasets
from multifire.checkpoint import digest_of, load_model
from multifire.datasets.loader import Batches, EventBatches, make_batches
from multifire.nn import SpikingResNet
from multifire.processes import ALONE, Processes
from multifire.progress import Bar
from multifire.runs import RunFolder
from multifire.runtime import autocast, describe_machine, pick_device, write_json


@dataclass(frozen=True)
class Evaluation:
    """Shares are between 0 and 1. The class without a sample has None for its accuracy."""

    count: int
    loss: float
    accuracy: float
    per_class: list[float | None]
    per_step: list[float]
    """Accuracy of the mean logits of the first t steps, for t = 1..T."""


@torch.no_grad()
def evaluate(
    model: SpikingResNet,
    batches: Batches | EventBatches,
    precision: str = "fp32",
    on_batch: Callable[[], None] | None = None,
    processes: Processes = ALONE,
) -> Evaluation:
    """Score the model, in evaluation mode, on every sample of `batches`; `on_batch` is called after each.

    Many processes share the samples, and each gets the figures of all.
    """
    was_training = model.training
    model.eval()
    loss_sum, hits, labels = 0.0, [], []
    for x_TNCHW, y in batches.epoch(0):
        with autocast(x_TNCHW.device, precision):
            logits_TNK = model(x_TNCHW, per_step=True).float()
        loss_sum += F.cross_entropy(logits_TNK.mean(0), y, reduction="sum").item()
        hits.append(running_predictions(logits_TNK).eq(y).cpu())
        labels.append(y.cpu())
        if on_batch:
            on_batch()
    model.train(was_training)
    return _score(loss_sum, torch.cat(hits, 1), torch.cat(labels), model.num_classes, processes)


def running_predictions(logits_TNK: Tensor) -> Tensor:
    """Class [T, N] predicted from the mean logits of the first t steps, t = 1..T; a common factor 1/t changes none."""
    return logits_TNK.cumsum(0).argmax(2)


def _score(loss_sum: float, hits_TN: Tensor, labels: Tensor, num_classes: int, processes: Processes) -> Evaluation:
    """From this process's samples the figures of all processes' samples."""
    of_class, final = torch.bincount(labels, minlength=num_classes), hits_TN[-1]
    right = torch.bincount(labels[final], minlength=num_classes)
    own = [torch.tensor([loss_sum]), hits_TN.sum(1), right, of_class]
    sums = processes.total(torch.cat([part.double() for part in own]))
    loss, right_T, right_K, count_K = sums.split([1, len(hits_TN), num_classes, num_classes])
    count = count_K.sum()
    return Evaluation(
        count=int(count),
        loss=(loss / count).item(),
        accuracy=(right_T[-1] / count).item(),
        per_class=[(r / n).item() if n else None for r, n in zip(right_K, count_K, strict=True)],
        per_step=(right_T / count).tolist(),
    )


def evaluate_run(
    folder: Path, which: str | None, root: str | None, device: str, batch_size: int | None
) -> tuple[dict[str, Any], Path]:
    """Score a run's checkpoint on its test set; the figures, and the file in the run's folder that now holds them.

    `which` is "best" or "last"; None takes the one that the summary's accuracy is of.
    """
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch size is {batch_size}, expected at least 1")
    run = RunFolder(folder)
    target = pick_device(device)
    which = which or run.headline()
    checkpoint = run.checkpoint(which)
    model, cfg = load_model(checkpoint)
    root = cfg.data.root if root is None else root
    data = datasets.load(cfg.data.name, root, cfg.data)
    size = cfg.eval_batch_size if batch_size is None else batch_size
    batches = make_batches(data.test, data.info, cfg.data, batch_size=size, device=target, shuffle=False)
    with Bar("evaluating", len(batches)) as bar:
        scored = evaluate(model.to(target), batches, cfg.precision, bar.advance)
    figures = {
        "checkpoint": which,
        "digest": digest_of(checkpoint),
        "classes": data.info.classes,
        **asdict(scored),
        "machine": describe_machine(target),
    }
    path = folder / f"eval-{which}.json"
    write_json(path, figures)
    return figures, path
