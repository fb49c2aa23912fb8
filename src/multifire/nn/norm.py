"""Threshold-dependent batch norm as a module."""

import torch
from torch import Tensor, nn

from multifire import ops


class TdBatchNorm2d(nn.Module):
    """Threshold-dependent batch norm (tdBN) of [T, N, C, H, W], with statistics per channel over T, N, H, W.

        y = γ · α·V_th·(x - μ) / (sqrt(σ²) + ε) + β

    It is not a BatchNorm2d, so that a conversion to SyncBatchNorm does not replace it and lose the factor α·V_th.

    Args:
        channels: C.
        v_threshold: V_th, the lowest threshold of the neurons that follow.
        alpha: α.
        affine: whether γ and β are learned; else they are 1 and 0.
        eps: ε, added outside the root.
        momentum: weight of a new batch in the running statistics.
        backend: "auto" or a name in `multifire.ops.BACKENDS`.

    Source: Zheng et al., AAAI 2021.
    """

    def __init__(
        self,
        channels: int,
        v_threshold: float = ops.PAPER_THRESHOLDS[0],
        alpha: float = 1.0,
        affine: bool = True,
        eps: float = 1e-5,
        momentum: float = 0.1,
        *,
        backend: str = "auto",
    ):
        super().__init__()
        self.channels, self.v_threshold, self.alpha = channels, v_threshold, alpha
        self.eps, self.momentum, self.backend = eps, momentum, backend
        self.sync = False  # True: in training, statistics over the samples of all processes
        self.weight = nn.Parameter(torch.ones(channels)) if affine else None
        self.bias = nn.Parameter(torch.zeros(channels)) if affine else None
        self.running_mean: Tensor
        self.running_var: Tensor
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def tensors(self) -> tuple[Tensor | None, Tensor | None, Tensor, Tensor]:
        """Return γ, β and the running statistics, in the order of an op's arguments."""
        return self.weight, self.bias, self.running_mean, self.running_var

    def options(self) -> dict:
        """Return the norm's keyword arguments of an op."""
        return {
            "training": self.training,
            "sync": self.sync,
            "momentum": self.momentum,
            "eps": self.eps,
            "scale": self.alpha * self.v_threshold,
        }

    def forward(self, x_TNCHW: Tensor) -> Tensor:
        return ops.tdbn(x_TNCHW, *self.tensors(), **self.options(), backend=self.backend).to(x_TNCHW.dtype)

    def extra_repr(self) -> str:
        return f"{self.channels}, v_threshold={self.v_threshold}, alpha={self.alpha}, affine={self.weight is not None}"
