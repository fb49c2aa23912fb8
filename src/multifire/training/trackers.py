"""Send a run's figures to trackers: TensorBoard, MLflow, Weights & Biases."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from importlib import util
from pathlib import Path
from typing import Any, Protocol

from multifire.utils.errors import unknown
from multifire.utils.log import log


class Tracker(Protocol):
    """Receives the figures of each epoch."""

    def log(self, epoch: int, figures: Mapping[str, float]) -> None:
        """Record the figures of one epoch."""

    def close(self) -> None:
        """End the tracker's run."""


class TensorBoard:
    """Writes TensorBoard's event files into the run's folder."""

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
    """Writes to the MLflow server or store that MLFLOW_TRACKING_URI names; a resumed run continues its MLflow run."""

    def __init__(self, folder: Path, fields: dict[str, Any]):
        import mlflow  # pyright: ignore[reportMissingImports] - an extra

        self._mlflow = mlflow
        id_file = folder / "mlflow-run.txt"
        run_id = id_file.read_text().strip() if id_file.is_file() else None
        run = mlflow.start_run(run_id=run_id) if run_id else mlflow.start_run(run_name=folder.name)
        if not run_id:
            mlflow.log_params(fields)
            id_file.write_text(run.info.run_id + "\n")

    def log(self, epoch: int, figures: Mapping[str, float]) -> None:
        self._mlflow.log_metrics(dict(figures), step=epoch)

    def close(self) -> None:
        self._mlflow.end_run()


class WeightsAndBiases:
    """Writes to Weights & Biases, as its environment variables say; a resumed run continues its wandb run."""

    def __init__(self, folder: Path, fields: dict[str, Any]):
        import wandb  # pyright: ignore[reportMissingImports] - an extra

        id_file = folder / "wandb-run.txt"
        run_id = id_file.read_text().strip() if id_file.is_file() else None
        self._run = wandb.init(dir=str(folder), name=folder.name, config=fields, id=run_id, resume="allow")
        id_file.write_text(self._run.id + "\n")

    def log(self, epoch: int, figures: Mapping[str, float]) -> None:
        self._run.log(dict(figures), step=epoch)

    def close(self) -> None:
        self._run.finish()


TRACKERS: dict[str, tuple[str, Callable[[Path, dict[str, Any]], Tracker]]] = {
    "tensorboard": ("tensorboard", TensorBoard),
    "mlflow": ("mlflow", MLflow),
    "wandb": ("wandb", WeightsAndBiases),
}
"""Name -> the package that the tracker needs, and its class."""


def check_trackers(names: tuple[str, ...]) -> None:
    """Check that these trackers are known and installed.

    Raises:
        ValueError: a tracker is unknown, or its package is missing.
    """
    for name in names:
        if name not in TRACKERS:
            raise unknown("tracker", name, TRACKERS)
        package = TRACKERS[name][0]
        if util.find_spec(package) is None:
            raise ValueError(f"--track {name} needs the package {package}: pip install 'multifire[{name}]'")


@contextlib.contextmanager
def warn_on_failure(tracker: Tracker) -> Iterator[None]:
    """Turn any error of a tracker into a warning: a server that does not answer must not end a run."""
    try:
        yield
    except Exception as error:  # its package may raise anything
        log.warning("%s failed (%s); metrics.jsonl has the figures", type(tracker).__name__, error)


@contextlib.contextmanager
def start_trackers(names: tuple[str, ...] | None, folder: Path, fields: dict[str, Any]) -> Iterator[list[Tracker]]:
    """Start the named trackers for the run in `folder` (default: TensorBoard, if it is installed).

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
    except Exception as error:  # its package may raise anything
        raise OSError(f"the tracker {name} did not start: {error}; fix that, or leave it out of --track") from error


def _close(tracker: Tracker) -> None:
    with warn_on_failure(tracker):
        tracker.close()
