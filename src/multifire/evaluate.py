"""What a network scores: loss and accuracy, at the end and after each time step, and which classes it confuses.

T time steps, N samples, K classes.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
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
from multifire.runtime import autocast, describe_machine, pick_device, ran_out, write_json


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
    loss_per_step: list[float]
    """Their loss."""
    confusion: list[list[int]]
    """How many samples of each class (row) were taken for each class (column)."""
    early: list[EarlyStop]
    """One for each margin that was asked for."""


@torch.no_grad()
def evaluate(
    model: SpikingResNet,
    batches: Batches | EventBatches | Iterable[tuple[Tensor, Tensor]],
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
    losses_T: Tensor | float = 0.0
    predictions, labels = [], []
    stopped = torch.zeros(len(stop_margins), 2, dtype=torch.float64)
    for x_TNCHW, y in batches.epoch(0) if isinstance(batches, Batches | EventBatches) else batches:
        with memory_explained(len(y)), autocast(x_TNCHW.device, precision):
            logits_TNK = model(x_TNCHW, per_step=True).float()
        losses_T = losses_T + running_losses(logits_TNK, y).double().cpu()
        predictions.append(running_predictions(logits_TNK).cpu())
        for row, margin in zip(stopped, stop_margins, strict=True):
            row += _stop_early(logits_TNK, predictions[-1].eq(y.cpu()), margin)
        labels.append(y.cpu())
        if on_batch:
            on_batch()
    model.train(was_training)
    if not isinstance(losses_T, Tensor):
        raise ValueError("there is no sample to score; pass at least one batch (x [T, N, C, H, W], y [N])")
    sums = (losses_T, torch.cat(predictions, 1), torch.cat(labels), stopped)
    return _score(*sums, model.num_classes, processes, stop_margins)


@contextlib.contextmanager
def memory_explained(samples: int) -> Iterator[None]:
    """Where memory runs out, say what to give less of."""
    try:
        yield
        return
    except (MemoryError, RuntimeError) as error:
        if not ran_out(error):
            raise
    raise MemoryError(
        f"out of memory while {samples} samples were evaluated at once; "
        "give a smaller --eval-batch-size (to `multifire eval`: --batch-size)"
    )


def running_predictions(logits_TNK: Tensor) -> Tensor:
    """Class [T, N] predicted from the mean logits of the first t steps, t = 1..T; a common factor 1/t changes none."""
    return logits_TNK.cumsum(0).argmax(2)


def running_losses(logits_TNK: Tensor, y: Tensor) -> Tensor:
    """Sum [T] over samples of the cross entropy of the mean logits of the first t steps, t = 1..T."""
    steps = range(1, len(logits_TNK) + 1)
    return torch.stack([F.cross_entropy(logits_TNK[:t].mean(0), y, reduction="sum") for t in steps])


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
    losses_T: Tensor,
    predicted_TN: Tensor,
    labels: Tensor,
    stopped: Tensor,
    num_classes: int,
    processes: Processes,
    stop_margins: Sequence[float],
) -> Evaluation:
    """From this process's samples the figures of all processes' samples."""
    confusion = torch.bincount(labels * num_classes + predicted_TN[-1], minlength=num_classes**2)
    own = [losses_T, predicted_TN.eq(labels).sum(1), confusion, stopped.flatten()]
    sums = processes.total(torch.cat([part.double() for part in own]))
    losses_T, right_T, confusion, early = sums.split([len(part) for part in own])
    confusion_KK = confusion.view(num_classes, num_classes)
    right_K, count_K = confusion_KK.diagonal(), confusion_KK.sum(1)
    count = count_K.sum()
    return Evaluation(
        count=int(count),
        loss=(losses_T[-1] / count).item(),
        accuracy=(right_T[-1] / count).item(),
        per_class=[(r / n).item() if n else None for r, n in zip(right_K, count_K, strict=True)],
        per_step=(right_T / count).tolist(),
        loss_per_step=(losses_T / count).tolist(),
        confusion=confusion_KK.long().tolist(),
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
