"""Count the figures of the epoch in progress: loss, accuracy, speed."""

import math
import time
from collections.abc import Sequence

import torch

from multifire.training.state import Training
from multifire.training.step import StepResult, learning_parameters
from multifire.utils.host_copy import HostCopy
from multifire.utils.log import log

DIVERGED = "the last good checkpoint, if there is one, is kept; a lower --optim.lr or --optim.clip-norm 1 may help"


class Meter:
    """Adds the figures of each training step to the run's position, one step later.

    By then the device has computed them, so that the host does not wait.
    """

    def __init__(self, training: Training):
        self._training = training
        self._position = training.position
        self._pending: HostCopy | None = None
        self._since = time.monotonic()
        self._seen_at_start = self._position.seen
        self._seconds_at_start = self._position.epoch_seconds

    def add(self, result: StepResult) -> None:
        """Count the step before, and start to copy the result of this one to the host."""
        copy = HostCopy(self._training.processes.total(result.totals), result.grad_norms)
        self.flush()
        self._pending = copy

    def flush(self) -> None:
        """Count the pending step.

        Raises:
            FloatingPointError: its loss or gradient is NaN or infinite, and `optim.skip_nonfinite` steps are skipped.
        """
        if self._pending is None:
            return
        (totals, grad_norms), self._pending = self._pending.wait(), None
        loss_sum, correct, samples = totals.tolist()
        position = self._position
        if math.isfinite(loss_sum) and torch.isfinite(grad_norms).all():
            position.loss_sum += loss_sum
            position.correct += int(correct)
            position.seen += int(samples)
        else:
            self._skip_or_raise(loss_sum / samples, grad_norms.tolist())
        now = time.monotonic()
        position.epoch_seconds += now - self._since
        self._since = now

    def _skip_or_raise(self, loss: float, grad_norms: Sequence[float]) -> None:
        """Count the pending step as skipped, or raise the FloatingPointError of `flush`."""
        position, training = self._position, self._training
        where = f"epoch {position.epoch + 1}, step {position.step}"
        names = {id(parameter): name for name, parameter in training.model.named_parameters()}
        ordered_names = [names[id(p)] for p in learning_parameters(training.optimizer)]
        norms = dict(zip(ordered_names, grad_norms, strict=True))
        first_bad = next((name for name, norm in norms.items() if not math.isfinite(norm)), "none")
        position.skipped += 1
        if position.skipped <= training.cfg.optim.skip_nonfinite:
            log.warning("%s skipped: loss %s, first gradient that is NaN or infinite: %s", where, loss, first_bad)
            return
        log.error(
            "norm of each gradient at %s: %s", where, ", ".join(f"{name} {norm:.3g}" for name, norm in norms.items())
        )
        raise FloatingPointError(
            f"the loss is {loss} at {where}, first gradient that is NaN or infinite: {first_bad}; {DIVERGED}"
        )

    def figures(self) -> str:
        """Return loss and accuracy of the epoch and the speed as text; empty before the first counted step."""
        position = self._position
        if position.seen == self._seen_at_start:
            return ""
        rate = (position.seen - self._seen_at_start) / (position.epoch_seconds - self._seconds_at_start)
        unit = self._training.sample_name
        accuracy = 100 * position.correct / position.seen
        return f"loss {position.loss_sum / position.seen:.4f}  acc {accuracy:5.2f} %  {rate:,.0f} {unit}/s"
