"""Score a run's checkpoint on its test set."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from multifire import datasets
from multifire.analysis.evaluate import check_margin, evaluate
from multifire.datasets.loader import make_batches
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
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch size is {batch_size}, expected at least 1")
    for margin in stop_margins:
        check_margin(margin)
    target = pick_device(device)
    run = load_run(folder, which)
    cfg = run.cfg
    root = cfg.data.root if root is None else root
    data = datasets.load(cfg.data.name, root, cfg.data)
    size = cfg.eval_batch_size if batch_size is None else batch_size
    batches = make_batches(data.test, data.info, cfg.data, batch_size=size, device=target, shuffle=False)
    with Bar("evaluating", len(batches)) as bar:
        scored = evaluate(run.model.to(target), batches, cfg.precision, bar.advance, stop_margins=stop_margins)
    figures = {
        "checkpoint": run.which,
        "digest": digest_of(run.checkpoint),
        "classes": data.info.classes,
        **asdict(scored),
        "machine": describe_machine(target),
    }
    path = folder / f"eval-{run.which}.json"
    write_json(path, figures)
    return figures, path
