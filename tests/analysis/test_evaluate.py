"""Scores of a network with given logits equal values that are computed by hand."""

import math

import pytest
import torch
from torch import Tensor, nn

from multifire.analysis.evaluate import evaluate, margins

# [T, N, K] of 3 steps, 4 samples, 3 classes. The last step alone would predict another class than the mean logits.
LOGITS_TNL = torch.tensor(
    [
        [[9.0, 0.0, 0.0], [0.0, 5.0, 0.0], [0.0, 0.0, 1.0], [4.0, 0.0, 0.0]],
        [[1.0, 0.0, 0.0], [0.0, 5.0, 0.0], [0.0, 0.0, 9.0], [0.0, 6.0, 0.0]],
        [[0.0, 3.0, 0.0], [6.0, 0.0, 0.0], [0.0, 9.0, 0.0], [0.0, 6.0, 0.0]],
    ]
)
LABELS = torch.tensor([0, 1, 2, 0])
PREDICTED_BY_MEAN = [0, 1, 2, 1]  # the sums are [10, 3, 0], [6, 10, 0], [0, 9, 10], [4, 12, 0]


class FixedLogits(nn.Module):
    """Returns the rows of LOGITS_TNL whose numbers are the pixels of the input."""

    num_classes = 3

    def forward(self, x_TNCHW: Tensor, *, per_step: bool) -> Tensor:
        return LOGITS_TNL[:, x_TNCHW[0, :, 0, 0, 0].long()]


def batches() -> list[tuple[Tensor, Tensor]]:
    """The four samples in batches of three and one; a sample's only pixel is its number."""
    numbers = torch.arange(4.0).view(1, 4, 1, 1, 1).expand(3, 4, 1, 1, 1)
    return [(numbers[:, :3], LABELS[:3]), (numbers[:, 3:], LABELS[3:])]


def cross_entropy(logits: list[float], label: int) -> float:
    return math.log(sum(math.exp(value) for value in logits)) - logits[label]


def test_accuracy_and_loss_are_those_of_the_mean_logits():
    scored = evaluate(FixedLogits(), batches())
    assert scored.count == 4
    assert scored.accuracy == 0.75
    assert scored.per_step == [1.0, 0.75, 0.75]
    sums = LOGITS_TNL.sum(0).tolist()
    by_hand = [cross_entropy([value / 3 for value in logits], int(y)) for logits, y in zip(sums, LABELS, strict=True)]
    assert scored.loss == pytest.approx(sum(by_hand) / 4)
    assert scored.loss_per_step[-1] == scored.loss


def test_confusion_rows_are_true_classes_and_give_the_accuracy_of_each_class():
    scored = evaluate(FixedLogits(), batches())
    expected = [[0, 0, 0] for _ in range(3)]
    for label, predicted in zip(LABELS.tolist(), PREDICTED_BY_MEAN, strict=True):
        expected[label][predicted] += 1
    assert scored.confusion == expected
    assert scored.per_class == [0.5, 1.0, 1.0]


def test_a_class_without_samples_has_no_accuracy():
    x, y = batches()[0]
    assert evaluate(FixedLogits(), [(x[:, :2], y[:2])]).per_class == [1.0, 1.0, None]


def test_a_sample_stops_at_the_first_step_whose_margin_is_large_enough():
    """At margin 0.9 samples 0 and 1 stop at step 1, sample 2 at step 2; sample 3 stops at step 1, where it is right."""
    (early,) = evaluate(FixedLogits(), batches(), stop_margins=[0.9]).early
    assert early.margin == 0.9
    assert early.mean_steps == (1 + 1 + 2 + 1) / 4
    assert early.accuracy == 1.0
    (late,) = evaluate(FixedLogits(), batches(), stop_margins=[0.99999]).early
    assert late.mean_steps == 3
    assert late.accuracy == 0.75


def test_margin_is_the_first_probability_minus_the_second():
    logits = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.1, 0.8]]).log()
    torch.testing.assert_close(margins(logits), torch.tensor([0.2, 0.7]))
