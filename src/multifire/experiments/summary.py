"""Summarise a network: its layers, parameters, operations and energy, and the memory that training needs."""

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from multifire import datasets
from multifire.analysis import Energy, measure_energy
from multifire.analysis.probe import preserve_state
from multifire.config import RECIPES, RunConfig, get_recipe
from multifire.nn import SpikingNetwork, kept_for_backward, model_from_config, require_known
from multifire.training.data import load_batches
from multifire.training.load_run import load_run
from multifire.training.optim import moments_of
from multifire.utils.device import autocast, pick_device
from multifire.utils.errors import unknown


@dataclass(frozen=True)
class Row:
    """A layer of the network."""

    name: str
    kind: str
    shape: tuple[int, ...]
    parameters: int
    ann_macs: int
    """MACs of one pass of the same network without time."""
    synops: float | None
    """SynOps of one inference; None if there are no data to count them on."""
    macs: float
    """MACs of one inference of the spiking network, spent on inputs that are not integers."""


@dataclass(frozen=True)
class Summary:
    """A network's layers, operations, energy and memory."""

    cfg: RunConfig
    source: str
    """Where the network comes from: a run and its checkpoint, or a recipe, untrained."""
    rows: list[Row]
    energy: Energy
    missing_data: str
    """Reason why SynOps were not counted; empty if they were."""
    kept_bytes: int
    """Kept by autograd between forward and backward pass, for one batch."""
    state_bytes: int
    """Weights, gradients and the optimiser's moments."""

    @property
    def parameters(self) -> int:
        """Number of parameters of the network."""
        return sum(row.parameters for row in self.rows)


def summarise(name: str, root: str | None = None) -> Summary:
    """Summarise the network of a run, or the untrained network of a recipe; count operations on a few test samples.

    The norms of an untrained network use batch statistics, since it has no meaningful running statistics.

    Args:
        name: name of a recipe, or a run's folder.
        root: folder of the data sets (default: the recipe's or the run's).

    Raises:
        ValueError: `name` is neither a recipe nor a run, or a file is damaged.
        FileNotFoundError: a folder that holds no run, or a run without a checkpoint.
    """
    device = pick_device("auto")
    trained = name not in RECIPES or (Path(name) / "config.json").is_file()
    if trained:
        if not Path(name).exists():
            raise unknown("recipe or run folder", name, RECIPES)
        run = load_run(Path(name))
        model, cfg, source = run.model, run.cfg, f"{name}, {run.which} checkpoint"
    else:
        cfg, _ = datasets.describe_run(get_recipe(name))
        torch.manual_seed(cfg.seed)
        model, source = model_from_config(cfg.model, cfg.backend), f"{name}, untrained"
    require_known(model, "multifire summary")
    model.to(device).train(not trained)
    if root is not None:
        cfg = replace(cfg, data=replace(cfg.data, root=root))
    info = datasets.describe(cfg.data)
    size = datasets.input_size(cfg.data, info)
    frames = torch.rand(cfg.data.timesteps, 2, cfg.model.in_channels, *size, device=device)
    missing_data = ""
    try:
        batches = load_batches(cfg, device).test_analysis.epoch(0)
        energy = measure_energy(model, batches, precision=cfg.precision)
    except FileNotFoundError as error:
        missing_data = str(error)
        energy = measure_energy(model, [(frames, torch.zeros(2))], precision=cfg.precision)
    x_TNCHW = frames if info.events else frames[:1].expand(frames.shape)
    with preserve_state(model, training=True), autocast(device, cfg.precision):
        kept_for_1, kept_for_2 = (kept_for_backward(model, x_TNCHW[:, :samples]).bytes for samples in (1, 2))
    samples_per_part = -(-cfg.optim.batch_size // cfg.optim.accumulate)
    kept = kept_for_1 + (samples_per_part - 1) * (kept_for_2 - kept_for_1)
    weights = sum(p.nbytes for p in model.parameters())
    copies = 2 + moments_of(cfg.optim)  # weights, gradients and the optimiser's moments
    return Summary(cfg, source, _rows(model, energy, not missing_data), energy, missing_data, kept, copies * weights)


def _rows(model: SpikingNetwork, energy: Energy, has_data: bool) -> list[Row]:
    """Return a row for each connection; its parameters include those of the norm that follows it."""
    rows = []
    for connection in energy.connections:
        name = connection.name.removesuffix(".conv")
        parameters = 0
        if connection.kind != "identity":
            parameters = sum(p.numel() for p in model.get_submodule(name).parameters())
        kind = type(model.get_submodule(name)).__name__ if parameters else "identity"
        synops = connection.synops if has_data else None
        rows.append(Row(name, kind, connection.shape, parameters, connection.ann_macs, synops, connection.macs))
    return rows
