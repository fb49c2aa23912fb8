"""Random int8 networks as files, and what `mf.load_int8` computes with them."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

import multifire as mf
from multifire.config import ModelConfig
from multifire.export.int8 import Int8Network, quantise_network, save_int8
from multifire.export.provenance import PROVENANCE_VERSION
from multifire.nn import model_from_config


def random_network(model: ModelConfig, counts: bool, seed: int = 0) -> Int8Network:
    """Return a network that fires in every layer: its norms hold the statistics of one batch."""
    torch.manual_seed(seed)
    network = model_from_config(model, backend="reference").train()
    for module in network.modules():
        if isinstance(module, mf.nn.TdBatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        network(random_frames(model, counts, 3, 4, (12, 12), seed))
    return quantise_network(network.eval(), model, counts)


def random_frames(
    model: ModelConfig, counts: bool, timesteps: int, samples: int, size: tuple[int, int], seed: int = 1
) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    shape = (timesteps, samples, model.in_channels, *size)
    if counts:
        return torch.poisson(torch.full(shape, 0.4), generator=generator)
    return torch.randn(shape, generator=generator)


def save(path: Path, network: Int8Network, frame_size: int | None = None) -> Path:
    provenance: dict[str, Any] = {
        "provenance": PROVENANCE_VERSION,
        "recipe": "random \u00e9\u2028\U0001f600",  # not ASCII, as recipes of users may be
        "config": {"model": vars(network.model), "data": {"frame_size": frame_size}},
        "data": {"name": "random", "about": "random"},
        "accuracy": [],
        "checkpoint": {"file": "none", "epochs": 0, "sha256": "none"},
        "versions": {},
    }
    save_int8(path, network, provenance)
    return path


def streamed(network: Int8Network, frames_TNCHW: torch.Tensor) -> tuple[list[np.ndarray], dict[str, np.ndarray]]:
    """Return the logits [L] after each frame of one sample, and the membranes of each layer after the last."""
    state, logits = None, []
    for frame_NCHW in frames_TNCHW:
        mean_NL, state = network.step(frame_NCHW, state)
        logits.append(mean_NL[0].numpy())
    assert state is not None
    return logits, {name: membranes[:, 0].numpy() for name, membranes in state.membranes.items()}
