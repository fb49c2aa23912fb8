"""What a network scores: loss, accuracy, accuracy of each class, and accuracy after each time step.

T time steps, N samples, K classes.
"""

from collections.abc import Callable, Sequence
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
class EarlyStop:
    """What becomes of the accuracy where a sample ends once its margin is above a threshold."""

    margin: float
    accuracy: float
    mean_steps: float


@dataclass(frozen=True)
class Evaluation:
    """Shares are between 0 and 1. The class without a sample has None for its accuracy."""

    count: int
    loss: float
    accuracy: float
    per_class: list[float | None]
    per_step: list[float]
    """Accuracy of the mean logits of the first t steps, for t = 1..T."""
    early: list[EarlyStop]
    """One for each margin that was asked for."""


@torch.no_grad()
def evaluate(
    model: SpikingResNet,
    batches: Batches | EventBatches,
    precision: str = "fp32",
    on_batch: Callable[[], None] | None = None,
    processes: Processes = ALONE,
    stop_margins: Sequence[float] = (),
) -> Evaluation:
    """Score the model, in evaluation mode, on every sample of `batches`; `on_batch` is called after each.

    Many processes share the samples, and each gets the figures of all. `stop_margins`: see `EarlyStop`.
    """
    was_training = model.training
    model.eval()
    loss_sum, hits, labels = 0.0, [], []
    stopped = torch.zeros(len(stop_margins), 2, dtype=torch.float64)
    for x_TNCHW, y in batches.epoch(0):
        with autocast(x_TNCHW.device, precision):
            logits_TNK = model(x_TNCHW, per_step=True).float()
        loss_sum += F.cross_entropy(logits_TNK.mean(0), y, reduction="sum").item()
        hits.append(running_predictions(logits_TNK).eq(y).cpu())
        for row, margin in zip(stopped, stop_margins, strict=True):
            row += _stop_early(logits_TNK, hits[-1], margin)
        labels.append(y.cpu())
        if on_batch:
            on_batch()
    model.train(was_training)
    sums = (loss_sum, torch.cat(hits, 1), torch.cat(labels), stopped)
    return _score(*sums, model.num_classes, processes, stop_margins)


def running_predictions(logits_TNK: Tensor) -> Tensor:
    """Class [T, N] predicted from the mean logits of the first t steps, t = 1..T; a common factor 1/t changes none."""
    return logits_TNK.cumsum(0).argmax(2)


def margins(logits_NK: Tensor) -> Tensor:
    """Margin [N]: the largest class probability (softmax) less the second."""
    first, second = logits_NK.softmax(-1).topk(2).values.unbind(-1)
    return first - second


def check_margin(margin: float) -> None:
    """Raise a ValueError for a threshold that no margin is compared with."""
    if not 0 <= margin < 1:
        raise ValueError(f"margin is {margin}, expected a difference of probabilities, 0 <= margin < 1")


def _stop_early(logits_TNK: Tensor, hits_TN: Tensor, margin: float) -> Tensor:
    """How many samples are right, and the sum of their steps, where each ends once its margin is above this."""
    steps = torch.arange(1, len(logits_TNK) + 1, device=logits_TNK.device)
    sure_TN = (margins(logits_TNK.cumsum(0) / steps[:, None, None]) > margin).cpu()
    sure_TN[-1] = True
    step_N = sure_TN.byte().argmax(0)  # the first
    return torch.stack([hits_TN.gather(0, step_N[None]).sum(), (step_N + 1).sum()]).double()


def _score(
    loss_sum: float,
    hits_TN: Tensor,
    labels: Tensor,
    stopped: Tensor,
    num_classes: int,
    processes: Processes,
    stop_margins: Sequence[float],
) -> Evaluation:
    """From this process's samples the figures of all processes' samples."""
    of_class, final = torch.bincount(labels, minlength=num_classes), hits_TN[-1]
    right = torch.bincount(labels[final], minlength=num_classes)
    own = [torch.tensor([loss_sum]), hits_TN.sum(1), right, of_class, stopped.flatten()]
    sums = processes.total(torch.cat([part.double() for part in own]))
    loss, right_T, right_K, count_K, early = sums.split([len(part) for part in own])
    count = count_K.sum()
    return Evaluation(
        count=int(count),
        loss=(loss / count).item(),
        accuracy=(right_T[-1] / count).item(),
        per_class=[(r / n).item() if n else None for r, n in zip(right_K, count_K, strict=True)],
        per_step=(right_T / count).tolist(),
        early=[
            EarlyStop(margin, *figures)
            for margin, figures in zip(stop_margins, (early / count).view(-1, 2).tolist(), strict=True)
        ],
    )


def evaluate_run(
    folder: Path,
    which: str | None,
    root: str | None,
    device: str,
    batch_size: int | None,
    stop_margins: Sequence[float] = (),
) -> tuple[dict[str, Any], Path]:
    """Score a run's checkpoint on its test set; the figures, and the file in the run's folder that now holds them.

    `which` is "best" or "last"; None takes the one that the summary's accuracy is of.
    """
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch size is {batch_size}, expected at least 1")
    for margin in stop_margins:
        check_margin(margin)
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
        scored = evaluate(model.to(target), batches, cfg.precision, bar.advance, stop_margins=stop_margins)
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
