"""Score a network: loss and accuracy, at the end and after each time step, and the confusion matrix.

Shapes: T time steps, N samples, L classes.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from multifire.datasets.loader import Batches, EventBatches
from multifire.nn import SpikingNetwork
from multifire.utils.device import autocast
from multifire.utils.memory import is_out_of_memory


@dataclass(frozen=True)
class EarlyStop:
    """Accuracy and mean number of time steps if each sample stops when its margin exceeds a threshold."""

    margin: float
    accuracy: float
    mean_steps: float


@dataclass(frozen=True)
class Evaluation:
    """Scores on a split. Accuracies are between 0 and 1; the accuracy of a class without samples is None."""

    count: int
    loss: float
    accuracy: float
    per_class: list[float | None]
    per_step: list[float]
    """Accuracy of the mean logits of the first t steps, for t = 1..T."""
    loss_per_step: list[float]
    """Loss of the mean logits of the first t steps, for t = 1..T."""
    confusion: list[list[int]]
    """Samples of each true class (row) by predicted class (column)."""
    early: list[EarlyStop]
    """One for each of `stop_margins`."""


@torch.no_grad()
def evaluate(
    model: SpikingNetwork,
    batches: Batches | EventBatches | Iterable[tuple[Tensor, Tensor]],
    precision: str = "fp32",
    on_batch: Callable[[], None] | None = None,
    total: Callable[[Tensor], Tensor] = lambda values: values,
    stop_margins: Sequence[float] = (),
    logits: Callable[[Tensor], Tensor] | None = None,
) -> Evaluation:
    """Score the model in evaluation mode on every sample of `batches`.

    Figures stay on the device until the last batch, so that the host does not wait for each one.

    Args:
        model: [T, N, C, H, W] -> per-step logits [T, N, L].
        batches: x [T, N, C, H, W] and labels y [N].
        precision: "bf16" runs convolutions under autocast.
        on_batch: called after each batch.
        total: returns the sum of a tensor over all processes that share the samples.
        stop_margins: thresholds of `EarlyStop`.
        logits: computes the model's logits [T, N, L] from x, for instance as a CUDA graph (default: the model itself).

    Raises:
        ValueError: there is no sample.
        MemoryError: a batch does not fit into memory.
    """
    was_training = model.training
    model.eval()
    losses_T: Tensor | float = 0.0
    stopped: Tensor | float = 0.0
    predictions, labels = [], []
    for x_TNCHW, y in batches.epoch(0) if isinstance(batches, Batches | EventBatches) else batches:
        with explain_out_of_memory(len(y)), autocast(x_TNCHW.device, precision):
            logits_TNL = (model(x_TNCHW, per_step=True) if logits is None else logits(x_TNCHW)).float()
        losses_T = losses_T + running_losses(logits_TNL, y).double()
        predictions.append(running_predictions(logits_TNL))
        labels.append(y)
        if stop_margins:
            hits_TN = predictions[-1].eq(y)
            stopped = stopped + torch.stack([_stop_early(logits_TNL, hits_TN, margin) for margin in stop_margins])
        if on_batch:
            on_batch()
    model.train(was_training)
    if not isinstance(losses_T, Tensor):
        raise ValueError("there is no sample to score; pass at least one batch (x [T, N, C, H, W], y [N])")
    stopped_M2 = torch.as_tensor(stopped).reshape(-1, 2) if stop_margins else torch.zeros(0, 2)
    predicted_TN, labels_N = torch.cat(predictions, 1).cpu(), torch.cat(labels).cpu()
    return _score(losses_T.cpu(), predicted_TN, labels_N, stopped_M2.cpu(), model.num_classes, total, stop_margins)


@contextlib.contextmanager
def explain_out_of_memory(samples: int) -> Iterator[None]:
    """Turn an out-of-memory error into a message that names the option to lower."""
    try:
        yield
        return
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
    raise MemoryError(
        f"out of memory while {samples} samples were evaluated at once; "
        "give a smaller --eval-batch-size (to `multifire eval`: --batch-size)"
    )


def running_predictions(logits_TNL: Tensor) -> Tensor:
    """Return the class [T, N] predicted from the mean logits of the first t steps, for t = 1..T."""
    # argmax of the sum: the factor 1/t changes no order.
    return logits_TNL.cumsum(0).argmax(2)


def running_losses(logits_TNL: Tensor, y: Tensor) -> Tensor:
    """Return the cross entropy of the mean logits of the first t steps, summed over samples, [T] for t = 1..T."""
    steps = range(1, len(logits_TNL) + 1)
    return torch.stack([F.cross_entropy(logits_TNL[:t].mean(0), y, reduction="sum") for t in steps])


def margins(logits_NL: Tensor) -> Tensor:
    """Return the margin [N]: the largest class probability (softmax) minus the second largest."""
    first, second = logits_NL.softmax(-1).topk(2).values.unbind(-1)
    return first - second


def check_margin(margin: float) -> None:
    """Raise a ValueError unless 0 <= margin < 1."""
    if not 0 <= margin < 1:
        raise ValueError(f"margin is {margin}, expected a difference of probabilities, 0 <= margin < 1")


def _stop_early(logits_TNL: Tensor, hits_TN: Tensor, margin: float) -> Tensor:
    """Return the number of correct samples and the sum of time steps if each stops when it exceeds the margin."""
    steps = torch.arange(1, len(logits_TNL) + 1, device=logits_TNL.device)
    stops_TN = margins(logits_TNL.cumsum(0) / steps[:, None, None]) > margin
    stops_TN[-1] = True
    step_N = stops_TN.byte().argmax(0)  # the first step at which the sample stops
    return torch.stack([hits_TN.gather(0, step_N[None]).sum(), (step_N + 1).sum()]).double()


def _score(
    losses_T: Tensor,
    predicted_TN: Tensor,
    labels: Tensor,
    stopped: Tensor,
    num_classes: int,
    total: Callable[[Tensor], Tensor],
    stop_margins: Sequence[float],
) -> Evaluation:
    """Compute the scores over all processes from the sums of this process."""
    confusion = torch.bincount(labels * num_classes + predicted_TN[-1], minlength=num_classes**2)
    own = [losses_T, predicted_TN.eq(labels).sum(1), confusion, stopped.flatten()]
    sums = total(torch.cat([part.double() for part in own]))
    losses_T, right_T, confusion, early = sums.split([len(part) for part in own])
    confusion_LL = confusion.view(num_classes, num_classes)
    right_L, count_L = confusion_LL.diagonal(), confusion_LL.sum(1)
    count = count_L.sum()
    return Evaluation(
        count=int(count),
        loss=(losses_T[-1] / count).item(),
        accuracy=(right_T[-1] / count).item(),
        per_class=[(r / n).item() if n else None for r, n in zip(right_L, count_L, strict=True)],
        per_step=(right_T / count).tolist(),
        loss_per_step=(losses_T / count).tolist(),
        confusion=confusion_LL.long().tolist(),
        early=[
            EarlyStop(margin, *figures)
            for margin, figures in zip(stop_margins, (early / count).view(-1, 2).tolist(), strict=True)
        ],
    )
