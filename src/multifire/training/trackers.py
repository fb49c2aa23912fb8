"""Trackers that receive a run's figures besides metrics.jsonl: TensorBoard, MLflow, Weights & Biases."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from importlib import util
from pathlib import Path
from typing import Any, Protocol

from multifire.utils.errors import unknown
from multifire.utils.log import log


class Tracker(Protocol):
    """Receives the figures of each epoch."""

    def log(self, epoch: int, figures: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """Event files in the run's folder."""

    def __init__(self, folder: Path, fields: dict[str, Any]):
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder))

    def log(self, epoch: int, figures: Mapping[str, float]) -> None:
        for name, value in figures.items():
            self._writer.add_scalar(name, value, epoch)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class MLflow:
    """A run of the server or store that MLFLOW_TRACKING_URI names; a resumed run continues the same one."""

    def __init__(self, folder: Path, fields: dict[str, Any]):
        import mlflow  # pyright: ignore[reportMissingImports] - an extra

        self._mlflow = mlflow
        identity = folder / "mlflow-run.txt"
        known = identity.read_text().strip() if identity.is_file() else None
        run = mlflow.start_run(run_id=known) if known else mlflow.start_run(run_name=folder.name)
        if not known:
            mlflow.log_params(fields)
            identity.write_text(run.info.run_id + "\n")

    def log(self, epoch: int, figures: Mapping[str, float]) -> None:
        self._mlflow.log_metrics(dict(figures), step=epoch)

    def close(self) -> None:
        self._mlflow.end_run()


class WeightsAndBiases:
    """A run of wandb, set up by its own environment variables; a resumed run continues the same one."""

    def __init__(self, folder: Path, fields: dict[str, Any]):
        import wandb  # pyright: ignore[reportMissingImports] - an extra

        identity = folder / "wandb-run.txt"
        known = identity.read_text().strip() if identity.is_file() else None
        self._run = wandb.init(dir=str(folder), name=folder.name, config=fields, id=known, resume="allow")
        identity.write_text(self._run.id + "\n")

    def log(self, epoch: int, figures: Mapping[str, float]) -> None:
        self._run.log(dict(figures), step=epoch)

    def close(self) -> None:
        self._run.finish()


TRACKERS: dict[str, tuple[str, Callable[[Path, dict[str, Any]], Tracker]]] = {
    "tensorboard": ("tensorboard", TensorBoard),
    "mlflow": ("mlflow", MLflow),
    "wandb": ("wandb", WeightsAndBiases),
}
"""Name -> the package that it needs, and its class."""


def check_trackers(names: tuple[str, ...]) -> None:
    """Check that these trackers exist and are installed.

    Raises:
        ValueError: unknown tracker, or its package is missing.
    """
    for name in names:
        if name not in TRACKERS:
            raise unknown("tracker", name, TRACKERS)
        package = TRACKERS[name][0]
        if util.find_spec(package) is None:
            raise ValueError(f"--track {name} needs the package {package}: pip install 'multifire[{name}]'")


@contextlib.contextmanager
def warn_on_failure(tracker: Tracker) -> Iterator[None]:
    """Turn any error of a tracker into a warning: a server that is away for a minute must not end a run."""
    try:
        yield
    except Exception as error:  # whatever its package raises
        log.warning("%s failed (%s); metrics.jsonl has the figures", type(tracker).__name__, error)


@contextlib.contextmanager
def start_trackers(names: tuple[str, ...] | None, folder: Path, fields: dict[str, Any]) -> Iterator[list[Tracker]]:
    """Start the trackers of these names for the run in `folder`; by default TensorBoard, if it is installed.

    Raises:
        OSError: a tracker does not start.
    """
    if names is None:
        names = ("tensorboard",) if util.find_spec("tensorboard") else ()
    with contextlib.ExitStack() as stack:
        trackers: list[Tracker] = []
        for name in names:
            trackers.append(_start(name, folder, fields))
            stack.callback(_close, trackers[-1])
        yield trackers


def _start(name: str, folder: Path, fields: dict[str, Any]) -> Tracker:
    try:
        return TRACKERS[name][1](folder, fields)
    except Exception as error:  # whatever its package raises
        raise OSError(f"the tracker {name} did not start: {error}; mend that, or leave it out of --track") from error


def _close(tracker: Tracker) -> None:
    with warn_on_failure(tracker):
        tracker.close()
