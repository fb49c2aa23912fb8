"""Do one training step: loss, gradients, clipping, optimiser.

Shapes: T time steps, N samples, C channels, H rows, W columns, L classes.
"""

import contextlib
import math
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from multifire.config import OptimConfig, RunConfig
from multifire.datasets.mixup import MixedLabels
from multifire.training.distributed import ALONE, Processes
from multifire.training.own import Loss, check_loss
from multifire.training.penalty import count_spikes
from multifire.utils.device import autocast
from multifire.utils.memory import first_step_done


class StepResult(NamedTuple):
    """Figures of a training step, as tensors on the device."""

    totals: Tensor
    """Sum of losses, number of correct predictions and number of samples in this process, float64 [3]."""
    grad_norms: Tensor
    """Norm of each parameter's gradient before clipping, in the order of `learning_parameters`."""


def train_step(
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    x_TNCHW: Tensor,
    y: Tensor,
    cfg: RunConfig,
    batch_samples: int | None = None,
    processes: Processes = ALONE,
    loss: Loss | None = None,
) -> StepResult:
    """Do one step of gradient descent and return its figures.

    With `optim.skip_nonfinite`, a step whose gradient is NaN or infinite leaves weights and buffers unchanged.

    Args:
        network: the model or its DistributedDataParallel wrapper.
        optimizer: holds the network's parameters.
        x_TNCHW: the samples of the batch that this process computes.
        y: their classes [N], or probabilities of the classes [N, L].
        cfg: loss, precision, accumulation and clipping.
        batch_samples: number of samples of the batch in all processes together (default: N).
        processes: the processes that share the batch.
        loss: a loss of one's own (default: the one that `cfg.optim` names).
    """
    optimizer.zero_grad(set_to_none=True)
    # DistributedDataParallel averages gradients over processes, hence the factor world.
    grad_scale = processes.world / (len(y) if batch_samples is None else batch_samples)
    saved_buffers = [buffer.clone() for buffer in network.buffers()] if cfg.optim.skip_nonfinite else []
    totals = torch.zeros(3, dtype=torch.float64, device=y.device)
    parts = cfg.optim.accumulate
    for part in range(parts):
        samples = slice(len(y) * part // parts, len(y) * (part + 1) // parts)
        with synchronise_gradients(network, is_last=part + 1 == parts):
            totals += forward_backward(network, x_TNCHW[:, samples], y[samples], cfg, grad_scale, loss)
    parameters = learning_parameters(optimizer)
    grad_norms = torch.stack(torch._foreach_norm([cast(Tensor, p.grad) for p in parameters]))
    total_norm = grad_norms.norm()
    if cfg.optim.clip_norm is not None:
        nn.utils.clip_grads_with_norm_(parameters, cfg.optim.clip_norm, total_norm)
    if not cfg.optim.skip_nonfinite or math.isfinite(total_norm.item()):
        optimizer.step()
    else:
        for buffer, saved in zip(network.buffers(), saved_buffers, strict=True):
            buffer.copy_(saved)
    first_step_done()  # from now on malloc keeps freed memory; later calls do nothing
    return StepResult(totals, grad_norms)


def targets(y: Tensor | MixedLabels, cfg: RunConfig) -> Tensor:
    """Return what the loss takes: the classes [N] of the samples or, if labels are mixed, probabilities [N, L]."""
    return y.soft(cfg.model.num_classes) if isinstance(y, MixedLabels) else y


def learning_parameters(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    """Return the optimiser's parameters that have a gradient: frozen and unused ones have none."""
    return [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]


def synchronise_gradients(network: nn.Module, is_last: bool) -> contextlib.AbstractContextManager:
    """Let DistributedDataParallel exchange gradients only in the last part of an accumulated batch."""
    if isinstance(network, DistributedDataParallel) and not is_last:
        return cast(contextlib.AbstractContextManager, network.no_sync())
    return contextlib.nullcontext()


def forward_backward(
    network: nn.Module, x_TNCHW: Tensor, y: Tensor, cfg: RunConfig, grad_scale: float, own_loss: Loss | None = None
) -> Tensor:
    """Compute the loss and add grad_scale·∇(sum of losses) to the parameters' gradients.

    The penalty on spikes is part of the gradient, not of the loss that is returned.

    Returns the sum of losses, the number of correct predictions and the number of samples, float64 [3].
    """
    # Without samples there are no batch statistics, so the network runs in evaluation mode. It must run, since the
    # other processes wait for its gradients.
    network.train(len(y) > 0 or cfg.sync_norm)
    penalty = cfg.optim.spike_penalty
    with count_spikes(network) if penalty else contextlib.nullcontext() as counter:
        with autocast(x_TNCHW.device, cfg.precision):
            logits_TNL = network(x_TNCHW, per_step=True)
        logits_TNL = logits_TNL.to(torch.promote_types(logits_TNL.dtype, torch.float32))
        loss = sum_of_losses(logits_TNL, y, cfg.optim) if own_loss is None else sum_of_own(own_loss, logits_TNL, y)
        objective = loss if counter is None else loss + penalty * counter.millions()
        (objective * grad_scale).backward()  # inside, since checkpointed stages run again
    classes = y if y.dim() == 1 else y.argmax(1)
    correct = logits_TNL.detach().mean(0).argmax(1).eq(classes).sum()
    return torch.stack([loss.detach().double(), correct.double(), torch.full_like(correct, len(y)).double()])


def sum_of_own(loss: Loss, logits_TNL: Tensor, y: Tensor) -> Tensor:
    """Return a loss of one's own, summed over the samples; 0 without samples."""
    return check_loss(loss(logits_TNL, y)) * len(y) if len(y) else 0 * logits_TNL.sum()


def sum_of_losses(logits_TNL: Tensor, y: Tensor, optim: OptimConfig) -> Tensor:
    """Return the loss that `optim.loss` names, summed over the samples; y holds classes or their probabilities.

        mean: CE(mean_t logits[t], y)        tet: mean_t CE(logits[t], y)

    Source of TET: Deng et al., "Temporal efficient training", ICLR 2022.
    """
    if optim.loss == "tet":
        timesteps = len(logits_TNL)
        repeated = y.repeat(timesteps, *[1] * (y.dim() - 1))
        losses = F.cross_entropy(
            logits_TNL.flatten(0, 1), repeated, reduction="sum", label_smoothing=optim.label_smoothing
        )
        return losses / timesteps
    return F.cross_entropy(logits_TNL.mean(0), y, reduction="sum", label_smoothing=optim.label_smoothing)
