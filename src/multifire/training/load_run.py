"""Load the trained network of a run."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from multifire.config import RunConfig
from multifire.nn import SpikingNetwork
from multifire.training.checkpoint import load_checkpoint, load_model
from multifire.training.checkpoint import load_weights as copy_weights
from multifire.training.run_folder import RunFolder


@dataclass(frozen=True)
class LoadedRun:
    """The trained network of a run, its configuration and its checkpoint."""

    model: SpikingNetwork
    cfg: RunConfig
    which: str
    """"best" or "last"."""
    checkpoint: Path


def load_weights(network: nn.Module, run: Any, which: str | None = None) -> None:
    """Copy the trained weights of a run, or of a checkpoint file, into a network.

    Args:
        network: the network that was given to `mf.train`, built again; or one of multifire's.
        run: what `mf.train` returned, the run's folder, or a checkpoint.
        which: "best" or "last" (default: the one whose accuracy the summary reports).

    Raises:
        FileNotFoundError: no such run or checkpoint.
        ValueError: the file is damaged, or its weights do not fit the network.
    """
    path = Path(getattr(run, "path", run))
    if path.is_dir():
        folder = RunFolder(path)
        path = folder.checkpoint(which or folder.reported_checkpoint())
    checkpoint = load_checkpoint(path)
    weights = checkpoint.average or checkpoint.model
    if not isinstance(network, SpikingNetwork):
        weights = {name.removeprefix("network."): tensor for name, tensor in weights.items()}
    copy_weights(network, weights, source=str(path))


def load_run(folder: Path, which: str | None = None, backend: str = "auto") -> LoadedRun:
    """Load the network of a run's "best" or "last" checkpoint.

    Args:
        folder: the run's folder.
        which: "best" or "last" (default: the one whose accuracy the summary reports).
        backend: implementation of the neuron: auto, cpu, triton or reference.

    Raises:
        FileNotFoundError: no such run or checkpoint.
        ValueError: a file is damaged.
    """
    run = RunFolder(folder)
    which = which or run.reported_checkpoint()
    checkpoint = run.checkpoint(which)
    model, cfg = load_model(checkpoint, backend)
    return LoadedRun(model, cfg, which, checkpoint)
