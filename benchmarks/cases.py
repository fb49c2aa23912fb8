"""Define the networks and batches that the benchmarks use.

Shapes: T time steps, N samples, C channels, H rows, W columns.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from multifire.config import DataConfig, ModelConfig, OptimConfig, RunConfig, get_recipe


@dataclass(frozen=True)
class Case:
    """Configuration of a network and size of its input."""

    cfg: RunConfig
    size: int
    """H and W of the input."""
    static: bool = False
    """True: the input is one image, the same at every time step. False: the input is frames of events."""

    @property
    def shape(self) -> tuple[int, int, int, int, int]:
        """Shape [T, N, C, H, W] of the input."""
        cfg = self.cfg
        return cfg.data.timesteps, cfg.optim.batch_size, cfg.model.in_channels, self.size, self.size

    def batch(self) -> tuple[Tensor, Tensor]:
        """Return random images or sparse random frames x [T, N, C, H, W] and labels y [N], the same at every call."""
        generator = torch.Generator().manual_seed(self.cfg.seed + 1)
        y = torch.randint(self.cfg.model.num_classes, (self.cfg.optim.batch_size,), generator=generator)
        if self.static:
            return torch.randn(self.shape[1:], generator=generator).expand(self.shape), y
        return torch.rand(self.shape, generator=generator).lt(0.1).float(), y

    def with_(self, *, timesteps: int | None = None, batch_size: int | None = None, **model) -> "Case":
        """Return the case with another T, another batch size or other fields of the model configuration."""
        cfg = self.cfg
        data = cfg.data if timesteps is None else replace(cfg.data, timesteps=timesteps)
        optim = cfg.optim if batch_size is None else replace(cfg.optim, batch_size=batch_size)
        return replace(self, cfg=replace(cfg, data=data, optim=optim, model=replace(cfg.model, **model)))


def _event_config(recipe: str, timesteps: int, model: ModelConfig) -> RunConfig:
    optim = OptimConfig(batch_size=8)  # the reference backend needs about half a gigabyte for each sample
    return RunConfig(recipe=recipe, data=DataConfig(timesteps=timesteps), model=model, optim=optim)


CIFAR10 = Case(get_recipe("cifar10"), 32, static=True).with_(batch_size=16)
GESTURE = Case(
    _event_config("dvs-gesture", 40, ModelConfig("ds_resnet20", 2, num_classes=11, width=16, norm_input=True)), 32
)
CIFAR10_DVS = Case(_event_config("cifar10-dvs", 10, ModelConfig("ds_resnet14", 2, width=32)), 42)
