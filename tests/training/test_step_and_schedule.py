"""Compare loss, gradients, schedules, weight decay and averages of the trainer with values computed by hand."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import multifire.training.loop as loop
from multifire.config import OptimConfig, TrainOptions
from multifire.datasets.loader import Batches
from multifire.datasets.splits import Split
from multifire.training.checkpoint import Position, load_checkpoint
from multifire.training.distributed import ALONE
from multifire.training.loop import train
from multifire.training.optim import learning_rate, make_optimizer
from multifire.training.signals import Requests
from multifire.training.state import set_up
from multifire.training.step import forward_backward, sum_of_losses, train_step
from tests.test_train import TINY, override

STEPS = 10
"""Steps per epoch in the schedules below."""


def rates(**optim) -> list[float]:
    """Return the learning rates of four epochs with a highest rate of 1."""
    cfg = OptimConfig(epochs=4, lr=1.0, **optim)
    return [learning_rate(cfg, step, STEPS) for step in range(4 * STEPS)]


def test_the_cosine_schedule_falls_from_lr_to_0():
    found = rates(schedule="cosine")
    assert found == pytest.approx([(1 + math.cos(math.pi * step / 40)) / 2 for step in range(40)])
    assert found[-1] < 0.002


@pytest.mark.parametrize("share", [0.25, 0.75])
def test_the_one_cycle_schedule_peaks_after_warmup_share(share):
    found = rates(schedule="one-cycle", warmup_share=share)
    assert found.index(max(found)) == 40 * share
    assert max(found) == 1.0
    assert found[0] == pytest.approx(1 / 25)


@pytest.mark.parametrize("schedule", ["step", "cosine"])
def test_the_warm_up_rises_in_equal_steps(schedule):
    plain, warmed = rates(schedule=schedule), rates(schedule=schedule, warmup_epochs=0.5)
    factors = [b / a for a, b in zip(plain, warmed, strict=True)]
    assert factors == pytest.approx([0.2, 0.4, 0.6, 0.8] + [1.0] * 36)


@pytest.mark.parametrize("decay_norms", [True, False])
def test_weight_decay_applies_to_the_configured_parameters(decay_norms):
    """With a gradient of 0 a step of SGD is w ← w - lr·decay·w."""
    model = nn.Sequential(nn.Conv2d(2, 3, 1, bias=False), nn.BatchNorm2d(3))
    optimizer = make_optimizer(model, OptimConfig(lr=0.5, momentum=0.0, weight_decay=0.1, decay_norms=decay_norms))
    before = [p.detach().clone() for p in model.parameters()]
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for p, old in zip(model.parameters(), before, strict=True):
        decays = decay_norms or p.dim() > 1
        torch.testing.assert_close(p.detach(), old * (0.95 if decays else 1.0))


def test_label_smoothing_mixes_labels_with_the_uniform_distribution():
    logits_TNL, y, smoothing = torch.randn(2, 3, 5), torch.tensor([0, 3, 4]), 0.2
    log_p = logits_TNL.mean(0).log_softmax(1)
    by_hand = -((1 - smoothing) * log_p[range(3), y] + smoothing * log_p.mean(1)).sum()
    torch.testing.assert_close(sum_of_losses(logits_TNL, y, OptimConfig(label_smoothing=smoothing)), by_hand)


class Linear(nn.Module):
    """A linear layer with logits [T, N, 10]. Without norms, the gradients of parts add up to those of the batch."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(9, 10)

    def forward(self, x_TNCHW: Tensor, *, per_step: bool) -> Tensor:
        return self.layer(x_TNCHW.flatten(2))


def test_a_step_uses_the_mean_gradient_of_the_batch_for_any_number_of_parts():
    torch.manual_seed(0)
    x, y = torch.randn(3, 7, 1, 3, 3), torch.randint(0, 10, (7,))
    model = Linear()
    loss = nn.functional.cross_entropy(model(x, per_step=True).mean(0), y)
    expected = torch.autograd.grad(loss, list(model.parameters()))
    for parts in (1, 3):
        cfg = override(TINY, optim={"accumulate": parts})
        train_step(model, torch.optim.SGD(model.parameters(), 0.0), x, y, cfg)
        for parameter, grad in zip(model.parameters(), expected, strict=True):
            torch.testing.assert_close(parameter.grad, grad)


def test_training_accuracy_uses_the_time_averaged_logits():
    class FixedLogits(nn.Module):
        def forward(self, x_TNCHW: Tensor, *, per_step: bool) -> Tensor:
            return torch.tensor([[[9.0, 0.0]], [[0.0, 3.0]]], requires_grad=True)  # T = 2; the mean predicts class 0

    totals = forward_backward(FixedLogits(), torch.zeros(2, 1, 1, 1, 1), torch.tensor([0]), TINY, 1.0)
    assert totals[1:].tolist() == [1.0, 1.0]


def test_the_moving_average_averages_weights_and_buffers(tmp_path):
    cfg = override(TINY, optim={"ema_decay": 0.9})
    training = set_up(cfg, tmp_path, TrainOptions(), ALONE, Requests())
    assert training.average
    training.average.update()  # the first update copies
    before = {name: tensor.clone() for name, tensor in training.model.state_dict().items()}
    with torch.no_grad():
        for tensor in training.model.state_dict().values():
            tensor.add_(1.0)
    training.average.update()
    for name, tensor in training.scored_model.state_dict().items():
        torch.testing.assert_close(tensor, before[name] + 0.1)


def test_the_best_checkpoint_holds_the_moving_average(tmp_path):
    train(override(TINY, optim={"ema_decay": 0.5, "epochs": 1}), tmp_path / "run")
    best, last = (load_checkpoint(tmp_path / "run" / f"{name}.safetensors") for name in ("best", "last"))
    assert all(torch.equal(best.model[name], tensor) for name, tensor in last.average.items())
    assert any(not torch.equal(best.model[name], tensor) for name, tensor in last.model.items())


def test_the_first_of_equally_good_epochs_is_the_best(tmp_path, monkeypatch):
    evaluate = loop.evaluate
    monkeypatch.setattr(loop, "evaluate", lambda *args, **options: replace(evaluate(*args, **options), accuracy=0.5))
    assert train(TINY, tmp_path / "run")["best"]["epoch"] == 0


def test_finishing_an_epoch_adds_its_samples_and_seconds_to_the_run():
    position = Position(epoch=2, step=7, seen=100, images=250, epoch_seconds=3.0, train_seconds=10.0, correct=9)
    position.finish_epoch()
    assert position == Position(epoch=3, images=350, train_seconds=13.0)


def test_every_image_of_a_batch_is_cropped_at_its_own_position():
    images = np.zeros((64, 1, 5, 5), np.uint8)
    images[:, :, 2, 2] = 255
    batches = Batches(
        Split(images, np.zeros(64, np.int64)), batch_size=64, timesteps=1, mean=(0.0,), std=(1.0,),
        device=torch.device("cpu"), shuffle=True, crop_padding=2,
    )  # fmt: skip
    ((x_TNCHW, _),) = batches.epoch(0)
    rows = {int(image.sum(1).argmax()) for image in x_TNCHW[0, :, 0]}
    columns = {int(image.sum(0).argmax()) for image in x_TNCHW[0, :, 0]}
    assert rows == columns == {0, 1, 2, 3, 4}
