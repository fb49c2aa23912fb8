"""Score a run's checkpoint, or an exported file, on its test set."""

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from multifire import datasets
from multifire.analysis.evaluate import Evaluation, check_margin, evaluate
from multifire.config import RunConfig
from multifire.datasets.loader import make_batches
from multifire.engine import native
from multifire.engine.networks import NativeNetwork, config_of_file
from multifire.export.int8 import load_int8
from multifire.training.load_run import load_run
from multifire.utils.device import describe_machine, pick_device
from multifire.utils.files import write_json
from multifire.utils.progress import Bar
from multifire.utils.tensor_files import digest_of


def evaluate_run(
    folder: Path,
    which: str | None,
    root: str | None,
    device: str,
    batch_size: int | None,
    stop_margins: Sequence[float] = (),
) -> tuple[dict[str, Any], Path]:
    """Score a run's checkpoint on its test set and write the figures to eval-CHECKPOINT.json in its folder.

    Args:
        folder: the run's folder.
        which: "best" or "last" checkpoint (default: the one whose accuracy summary.json holds).
        root: folder of the data sets (default: the run's).
        device: auto, cpu, cuda or cuda:N.
        batch_size: samples in one evaluation step (default: the run's).
        stop_margins: margins at which samples stop early; the figures hold an `EarlyStop` for each.

    Returns:
        The figures, and the file that they were written to.

    Raises:
        FileNotFoundError: no such run, checkpoint or data.
        ValueError: a damaged file, or an option out of range.
    """
    _check(batch_size, stop_margins)
    target = pick_device(device)
    run = load_run(folder, which)
    scored = _score(run.model.to(target), run.cfg, target, root, batch_size, stop_margins)
    return _record(scored, run.cfg, run.which, run.checkpoint, target, folder / f"eval-{run.which}.json")


def evaluate_file(
    path: Path, root: str | None, batch_size: int | None = None, stop_margins: Sequence[float] = ()
) -> tuple[dict[str, Any], Path]:
    """Score an exported int8 file as `evaluate_run` scores a run; in the native engine, or in torch without it.

    Raises:
        FileNotFoundError: no such file or data.
        ValueError: a damaged file, one without provenance, or an option out of range.
    """
    _check(batch_size, stop_margins)
    cfg, device = config_of_file(path), torch.device("cpu")
    network = NativeNetwork(native.load(path)) if native.is_built() else load_int8(path)
    exact = replace(cfg, precision="fp32")  # nothing is under autocast in an int8 network
    scored = _score(network, exact, device, root, batch_size, stop_margins)
    return _record(scored, cfg, path.stem, path, device, path.with_name(f"eval-{path.stem}.json"))


def _check(batch_size: int | None, stop_margins: Sequence[float]) -> None:
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch size is {batch_size}, expected at least 1")
    for margin in stop_margins:
        check_margin(margin)


def _score(
    network: Any,
    cfg: RunConfig,
    device: torch.device,
    root: str | None,
    batch_size: int | None,
    stop_margins: Sequence[float],
) -> Evaluation:
    """Score a network, or what has its interface, on the test set of a configuration."""
    data = datasets.load(cfg.data.name, cfg.data.root if root is None else root, cfg.data)
    size = cfg.eval_batch_size if batch_size is None else batch_size
    batches = make_batches(data.test, data.info, cfg.data, batch_size=size, device=device, shuffle=False)
    with Bar("evaluating", len(batches)) as bar:
        return evaluate(network, batches, cfg.precision, bar.advance, stop_margins=stop_margins)


def _record(
    scored: Evaluation, cfg: RunConfig, name: str, checkpoint: Path, device: torch.device, path: Path
) -> tuple[dict[str, Any], Path]:
    """Write the figures to `path`, and return both."""
    figures = {
        "checkpoint": name,
        "digest": digest_of(checkpoint),
        "classes": datasets.describe(cfg.data).classes,
        **asdict(scored),
        "machine": describe_machine(device),
    }
    write_json(path, figures)
    return figures, path
