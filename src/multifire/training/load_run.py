"""Load the trained network of a run."""

from dataclasses import dataclass
from pathlib import Path

from multifire.config import RunConfig
from multifire.nn import SpikingResNet
from multifire.training.checkpoint import load_model
from multifire.training.run_folder import RunFolder


@dataclass(frozen=True)
class LoadedRun:
    """The trained network of a run, its configuration and its checkpoint."""

    model: SpikingResNet
    cfg: RunConfig
    which: str
    """"best" or "last"."""
    checkpoint: Path


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
