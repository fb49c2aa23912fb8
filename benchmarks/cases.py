"""The networks and batches that are measured.

Shapes: x_TNCHW is [time, sample, channel, row, column].
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from multifire.config import DataConfig, ModelConfig, OptimConfig, RunConfig, get_recipe


@dataclass(frozen=True)
class Case:
    """A network with the shape of its input; `still` is one image repeated over time, else frames of events."""

    cfg: RunConfig
    size: int
    still: bool = False

    @property
    def shape(self) -> tuple[int, int, int, int, int]:
        cfg = self.cfg
        return cfg.data.timesteps, cfg.optim.batch_size, cfg.model.in_channels, self.size, self.size

    def batch(self) -> tuple[Tensor, Tensor]:
        """Random images or sparse frames x_TNCHW of this shape, and labels; the same at every call."""
        generator = torch.Generator().manual_seed(self.cfg.seed + 1)
        y = torch.randint(self.cfg.model.num_classes, (self.cfg.optim.batch_size,), generator=generator)
        if self.still:
            return torch.randn(self.shape[1:], generator=generator).expand(self.shape), y
        return torch.rand(self.shape, generator=generator).lt(0.1).float(), y

    def with_(self, *, timesteps: int | None = None, batch_size: int | None = None, **model) -> "Case":
        """The same case with another T, batch or network."""
        cfg = self.cfg
        data = cfg.data if timesteps is None else replace(cfg.data, timesteps=timesteps)
        optim = cfg.optim if batch_size is None else replace(cfg.optim, batch_size=batch_size)
        return replace(self, cfg=replace(cfg, data=data, optim=optim, model=replace(cfg.model, **model)))


def _events(recipe: str, timesteps: int, model: ModelConfig) -> RunConfig:
    optim = OptimConfig(batch_size=8)  # the reference backend holds about half a gigabyte for each sample
    return RunConfig(recipe=recipe, data=DataConfig(timesteps=timesteps), model=model, optim=optim)


CIFAR10 = Case(get_recipe("cifar10"), 32, still=True).with_(batch_size=16)
GESTURE = Case(_events("dvs-gesture", 40, ModelConfig("ds_resnet20", 2, num_classes=11, width=16, norm_input=True)), 32)
CIFAR10_DVS = Case(_events("cifar10-dvs", 10, ModelConfig("ds_resnet14", 2, width=32)), 42)
