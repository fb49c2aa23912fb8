"""Do training steps, and compute logits for evaluations, as CUDA graphs: they cost the host one launch each."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from multifire.config import RunConfig
from multifire.datasets.mixup import MixedLabels
from multifire.nn import SpikingNetwork
from multifire.training.average import MovingAverage
from multifire.training.distributed import ALONE, Processes
from multifire.training.own import Loss
from multifire.training.step import StepResult, targets, train_step
from multifire.utils.cuda_graph import CapturedFunction
from multifire.utils.device import autocast


def why_not_captured(cfg: RunConfig, processes: Processes) -> str | None:
    """Return the reason why the training steps of a run cannot be a CUDA graph, or None."""
    if processes.world > 1:
        return "several processes exchange gradients"
    if cfg.optim.skip_nonfinite:
        return "optim.skip_nonfinite reads the gradient's norm before the optimiser's step"
    return None


class TrainingStep:
    """Does training steps as `multifire train` does: `train_step`, and the update of the moving average.

    A captured step is replayed as a CUDA graph, except for batches of another size than the first one.
    """

    def __init__(
        self,
        network: nn.Module,
        optimizer: torch.optim.Optimizer,
        cfg: RunConfig,
        *,
        processes: Processes = ALONE,
        average: MovingAverage | None = None,
        loss: Loss | None = None,
        captured: bool = False,
    ):
        """Prepare the steps.

        Args:
            network: the model or its DistributedDataParallel wrapper.
            optimizer: holds the network's parameters. If `captured` is set, its learning rate is a tensor.
            cfg: loss, precision, accumulation and clipping.
            processes: the processes that share a batch.
            average: moving average of the weights.
            loss: a loss of one's own.
            captured: replay the step as a CUDA graph; see `why_not_captured`.
        """
        self._network, self._optimizer, self._cfg = network, optimizer, cfg
        self._processes, self._average, self._loss = processes, average, loss
        self._captured = CapturedFunction(self._step, "training steps") if captured else None

    @property
    def is_captured(self) -> bool:
        """True if steps are replayed as a CUDA graph."""
        return self._captured is not None

    def __call__(self, x_TNCHW: Tensor, y: Tensor | MixedLabels, batch_samples: int | None = None) -> StepResult:
        """Do one step; see `train_step`. The result of a captured step is valid until the next step."""
        y = targets(y, self._cfg)
        if self._captured is not None and batch_samples in (None, len(y)):
            return self._captured(x_TNCHW, y)
        return self._step(x_TNCHW, y, batch_samples)

    def _step(self, x_TNCHW: Tensor, y: Tensor, batch_samples: int | None = None) -> StepResult:
        options = (batch_samples, self._processes, self._loss)
        result = train_step(self._network, self._optimizer, x_TNCHW, y, self._cfg, *options)
        if self._average is not None:
            self._average.update()
        return result


def logits_function(model: SpikingNetwork, precision: str, captured: bool) -> Callable[[Tensor], Tensor]:
    """Return a function that computes the model's logits [T, N, L] in fp32 from x [T, N, C, H, W].

    The result of a captured function is valid until its next call.
    """

    def logits(x_TNCHW: Tensor) -> Tensor:
        with autocast(x_TNCHW.device, precision):
            return model(x_TNCHW, per_step=True).float()

    return CapturedFunction(logits, "evaluations") if captured else logits
