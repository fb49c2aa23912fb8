"""Summarise a network: layers, shapes, parameters, operations, energy, and the memory of training."""

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from multifire import datasets
from multifire.analysis import Energy, measure_energy
from multifire.analysis.probe import undisturbed
from multifire.config import RECIPES, RunConfig, get_recipe
from multifire.nn import SpikingResNet, kept_for_backward, model_from_config
from multifire.training.data import load_batches
from multifire.training.load_run import load_run
from multifire.utils.device import autocast, pick_device
from multifire.utils.errors import unknown


@dataclass(frozen=True)
class Row:
    name: str
    kind: str
    shape: tuple[int, ...]
    parameters: int
    macs: int
    """MACs of one pass of the network without time."""
    synops: float | None
    """SynOps of an inference; None without data to count them on."""
    real: float
    """MACs of an inference of the spiking network: inputs that are not integers."""


@dataclass(frozen=True)
class Summary:
    cfg: RunConfig
    of: str
    """The network in words: a run's checkpoint, or a recipe, untrained."""
    rows: list[Row]
    energy: Energy
    without_data: str
    """Reason why SynOps were not counted; empty if they were."""
    kept_bytes: int
    """Kept by autograd between forward and backward pass, for one batch."""
    state_bytes: int
    """Weights, gradients and momentum."""

    @property
    def parameters(self) -> int:
        return sum(row.parameters for row in self.rows)


def summarise(what: str, root: str | None = None) -> Summary:
    """Summarise the network of a run, or the untrained network of a recipe; count operations on a few test samples.

    The norms of an untrained network use batch statistics, since it has no meaningful running statistics.

    Args:
        what: name of a recipe, or a run's folder.
        root: folder of the data sets (default: the recipe's or the run's).

    Raises:
        ValueError: neither a recipe nor a run, or a damaged file.
        FileNotFoundError: a folder that holds no run, or a run without a checkpoint.
    """
    device = pick_device("auto")
    trained = what not in RECIPES or (Path(what) / "config.json").is_file()
    if trained:
        if not Path(what).exists():
            raise unknown("recipe or run folder", what, RECIPES)
        run = load_run(Path(what))
        model, cfg, of = run.model, run.cfg, f"{what}, {run.which} checkpoint"
    else:
        cfg = get_recipe(what)
        torch.manual_seed(cfg.seed)
        model, of = model_from_config(cfg.model, cfg.backend), f"{what}, untrained"
    model.to(device).train(not trained)
    if root is not None:
        cfg = replace(cfg, data=replace(cfg.data, root=root))
    info = datasets.get_info(cfg.data.name)
    size = cfg.data.frame_size if info.events else info.size
    frames = torch.rand(cfg.data.timesteps, 2, cfg.model.in_channels, size, size, device=device)
    reason = ""
    try:
        batches = load_batches(cfg, device).test_analysis.epoch(0)
        energy = measure_energy(model, batches, precision=cfg.precision)
    except FileNotFoundError as missing:
        reason = str(missing)
        energy = measure_energy(model, [(frames, torch.zeros(2))], precision=cfg.precision)
    shown = frames if info.events else frames[:1].expand(frames.shape)
    with undisturbed(model, training=True), autocast(device, cfg.precision):
        one, two = (kept_for_backward(model, shown[:, :samples]).bytes for samples in (1, 2))
    weights = sum(p.nbytes for p in model.parameters())
    part = -(-cfg.optim.batch_size // cfg.optim.accumulate)
    kept = one + (part - 1) * (two - one)
    return Summary(cfg, of, _rows(model, energy, not reason), energy, reason, kept, 3 * weights)


def _rows(model: SpikingResNet, energy: Energy, counted: bool) -> list[Row]:
    """Return a row for each connection, with the parameters of the norm that follows it."""
    rows = []
    for connection in energy.connections:
        name = connection.name.removesuffix(".conv")
        parameters = 0
        if connection.kind != "identity":
            parameters = sum(p.numel() for p in model.get_submodule(name).parameters())
        kind = type(model.get_submodule(name)).__name__ if parameters else "identity"
        synops = connection.synops if counted else None
        rows.append(Row(name, kind, connection.shape, parameters, connection.ann_macs, synops, connection.macs))
    return rows
