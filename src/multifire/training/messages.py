"""Print messages during training: header, table of epochs and progress bar, at most 80 columns wide."""

from types import TracebackType
from typing import Any, Self

import torch

from multifire import ops
from multifire.nn import is_own
from multifire.training.records import selection_split
from multifire.training.state import Training
from multifire.utils.device import processor
from multifire.utils.progress import Bar, format_seconds, print_line


def show_header(training: Training) -> None:
    """Print the recipe, network, data and device, then the head of the table of epochs."""
    for name, text in header(training):
        print_line(f"{name:<8}{text}")
    print_line(epoch_head(training))


def header(training: Training) -> list[tuple[str, str]]:
    """Return name and text of each line of the header."""
    cfg, batches, unit = training.cfg, training.batches, training.sample_name
    info = batches.info
    parameters = sum(p.numel() for p in training.model.parameters())
    layers = f", width {cfg.model.width}, K = {cfg.model.levels}" if not is_own(training.model) else ""
    scored = f"{batches.selection.order.samples:,} {selection_split(cfg)}"
    weight = next(training.model.parameters())
    device = weight.device
    device_text = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"{processor()}, {torch.get_num_threads()} threads"
    )
    kernel = ops.backend_name(cfg.backend, weight, cfg.model.levels, cfg.model.surrogate)
    processes = f", {training.processes.world} processes" if training.processes.world > 1 else ""
    epochs = f"{cfg.optim.epochs} of {training.steps_per_epoch:,} steps with {cfg.optim.batch_size} {unit}"
    resumed = f", resumed at epoch {training.position.epoch + 1}" if training.step else ""
    return [
        ("recipe", cfg.recipe),
        ("network", f"{cfg.model.name}{layers}, T = {cfg.data.timesteps}; "
                    f"{parameters:,} parameters"),
        ("data", f"{cfg.data.name}{' (simulated)' * info.simulated}: {batches.train.order.samples:,} training and "
                 f"{scored} {unit}"),
        ("device", f"{device_text}{processes}"),
        ("kernel", f"{kernel}, {cfg.precision}{', CUDA graphs' * training.do_step.is_captured}"),
        ("epochs", f"{epochs}{resumed}"),
        ("folder", str(training.run.path)),
    ]  # fmt: skip


def epoch_head(training: Training) -> str:
    """Return the line above the table of epochs, which names its columns."""
    split, unit = selection_split(training.cfg), f"{training.sample_name}/s"
    return f"{'epoch':>9} {'train loss':>11} {'acc':>8} {f'{split} loss':>16} {'acc':>8} {unit:>11} {'time':>8}"


def epoch_line(training: Training, figures: dict[str, Any]) -> str:
    """Return the line of the table for the epoch that has just finished."""
    position, split = training.position, selection_split(training.cfg)
    epoch = f"{position.epoch + 1}/{training.cfg.optim.epochs}"
    accuracies = (100 * figures["train_accuracy"], 100 * figures[f"{split}_accuracy"])
    return (
        f"{epoch:>9} {figures['train_loss']:11.4f} {accuracies[0]:6.2f} % {figures[f'{split}_loss']:16.4f} "
        f"{accuracies[1]:6.2f} % {figures['images_per_second']:11,.0f} {format_seconds(figures['seconds']):>8}"
    )


class TrainingBar:
    """A progress bar for the whole run, which moves with every training step and every scored batch."""

    def __init__(self, training: Training):
        self._training = training
        self._scored = 0
        self._units_per_epoch = training.steps_per_epoch + len(training.batches.selection)
        self._bar = Bar("training", training.cfg.optim.epochs * self._units_per_epoch, self._done())

    def __enter__(self) -> Self:
        self._bar.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        self._bar.__exit__(kind, error, trace)

    @property
    def epoch_name(self) -> str:
        """The current epoch, such as "epoch 3/10"."""
        return f"epoch {self._training.position.epoch + 1}/{self._training.cfg.optim.epochs}"

    def step_finished(self, figures: str) -> None:
        """Move the bar by one training step; `figures` is shown beside it."""
        self._scored = 0
        self._bar.update(self._done(), figures, f"{self.epoch_name} training")

    def batch_scored(self) -> None:
        """Move the bar by one batch of the evaluation."""
        self._scored += 1
        self._bar.update(self._done(), "", f"{self.epoch_name} evaluation")

    def say(self, line: str) -> None:
        """Print a line above the bar."""
        self._bar.say(line)

    def _done(self) -> int:
        position = self._training.position
        return position.epoch * self._units_per_epoch + position.step + self._scored
