"""Random int8 networks as files, what `mf.load_int8` computes with them, and programs that run them."""

import dataclasses
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

import multifire as mf
from multifire.config import ModelConfig
from multifire.export.int8 import Int8MLF, Int8Network, quantise_network, save_int8
from multifire.export.provenance import PROVENANCE_VERSION
from multifire.nn import model_from_config

ISAS = ("portable", "avx2", "avx512_vnni", "amx", "neon", "neon_dotprod")
COUNTS = ModelConfig(name="ds_resnet8", in_channels=2, width=16, num_classes=11, norm_input=True)
IMAGES = ModelConfig(name="ds_resnet8", width=16)
NETWORKS = [
    (COUNTS, True, (17, 17)),
    (COUNTS, True, (32, 32)),
    (IMAGES, False, (12, 9)),
    (dataclasses.replace(COUNTS, width=8, norm_input=False, levels=1), True, (7, 5)),
    (dataclasses.replace(COUNTS, width=5, levels=2), True, (1, 1)),
    (dataclasses.replace(COUNTS, width=64, levels=4), True, (9, 35)),
    (dataclasses.replace(COUNTS, membranes="own", reset="subtract", decay=0.5), True, (8, 8)),
    (dataclasses.replace(COUNTS, membranes="shared", reset="any"), True, (2, 70)),
    (dataclasses.replace(COUNTS, membranes="shared", reset="subtract", levels=8), True, (11, 2)),
    (dataclasses.replace(IMAGES, width=48, norm_input=True, in_channels=1), False, (8, 8)),
    (dataclasses.replace(IMAGES, width=33, surrogate_width=0.7), False, (5, 33)),
    (dataclasses.replace(IMAGES, name="ds_resnet20", thresholds=(0.3, -0.1, 2.0), decay=-0.3), False, (8, 8)),
    (dataclasses.replace(COUNTS, name="ds_resnet44"), True, (10, 10)),
]


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


def sparser_networks(network: Int8Network) -> Iterator[Int8Network]:
    """Change a network so that it fires less and less; yield it each time."""
    for _ in range(4):
        yield network
        for layer in network.network.modules():
            if isinstance(layer, Int8MLF):
                layer.bias -= 0.15


def assert_same_bits(command: tuple[str | Path, ...], path: Path, frames_TNCHW: torch.Tensor) -> dict[str, int]:
    """Compare run_network.c with `mf.load_int8`.

    Returns:
        for each instruction set that runs, how many frames of all layers were computed from lists.
    """
    expected = _expected_values(path, frames_TNCHW)
    assert expected.std() > 0
    sparse_frames = {}
    for isa in ISAS:
        if found := _found_by((*command, path), frames_TNCHW, isa):
            values, sparse_frames[isa] = found
            assert np.array_equal(values, expected), isa
    return sparse_frames


def _found_by(command: tuple[str | Path, ...], frames_TNCHW: torch.Tensor, isa: str) -> tuple[np.ndarray, int] | None:
    """Return what run_network.c writes; None if the instruction set does not run."""
    timesteps, samples, _, height, width = map(str, frames_TNCHW.shape)
    done = subprocess.run(
        [*command, timesteps, samples, height, width],
        input=frames_TNCHW.numpy().tobytes(), env=os.environ | {"MULTIFIRE_ENGINE_ISA": isa}, capture_output=True,
    )  # fmt: skip
    error = done.stderr.decode()
    if done.returncode:
        assert "MULTIFIRE_ENGINE_ISA" in error, error
        return None
    name, sparse_frames = error.split()
    assert name == isa
    return np.frombuffer(done.stdout, np.float32), int(sparse_frames)


def _expected_values(path: Path, frames_TNCHW: torch.Tensor) -> np.ndarray:
    """Return the same values, as `mf.load_int8` computes them."""
    network = mf.load_int8(path)
    values = [network(frames_TNCHW, per_step=True).numpy(), network(frames_TNCHW).numpy()]
    for sample in range(frames_TNCHW.shape[1]):
        logits, states = streamed(network, frames_TNCHW[:, sample : sample + 1])
        values += [*logits, *states.values()]
    return np.concatenate([part.ravel() for part in values])
