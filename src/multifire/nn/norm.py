"""Threshold-dependent batch norm as a module."""

import torch
from torch import Tensor, nn

from multifire import ops


class TdBatchNorm2d(nn.Module):
    """Threshold-dependent batch norm of [T, N, C, H, W]; see `multifire.ops.tdbn` for the equation.

    Composes its own scale α·V_th; it is no BatchNorm2d, which a conversion to SyncBatchNorm would replace, dropping it.
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
        self.sync = False  # whether training takes the statistics of all processes' samples
        self.weight = nn.Parameter(torch.ones(channels)) if affine else None
        self.bias = nn.Parameter(torch.zeros(channels)) if affine else None
        self.running_mean: Tensor
        self.running_var: Tensor
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def tensors(self) -> tuple[Tensor | None, Tensor | None, Tensor, Tensor]:
        """γ, β and the running statistics, as an op takes them."""
        return self.weight, self.bias, self.running_mean, self.running_var

    def options(self) -> dict:
        """The keyword arguments that the norm adds to an op."""
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
