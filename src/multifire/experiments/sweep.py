"""Carry out a sweep: train many runs in processes side by side, and continue a sweep that was stopped."""

import contextlib
import itertools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from multifire.config import RunConfig
from multifire.experiments.sweep_budget import Cost, apply_budget, parse_budget
from multifire.experiments.sweep_cells import Cell, Outcome, train_args
from multifire.report.run_files import RunFiles
from multifire.training.run_folder import RunFolder
from multifire.training.signals import catch_signals
from multifire.utils.files import lock_folder
from multifire.utils.progress import Bar

POLL_SECONDS = 0.2
STOP_SECONDS = 60.0
"""Time that a run has to write its checkpoint after it was asked to stop."""


def sweep(
    cells: list[Cell], out: Path, *, budget: str | None, jobs: int,
    cost: Callable[[RunConfig], Cost], say: Callable[[str], None],
) -> tuple[list[Outcome], int]:  # fmt: skip
    """Train the runs of a sweep in the folder `out`; continue those that were stopped.

    A budget is turned into epochs once and stored in sweep.json, so that a continued sweep uses the same epochs.

    Args:
        cells: the runs.
        out: folder of the runs.
        budget: time for all runs, or epochs of each; None: the epochs of the recipe.
        jobs: number of runs at a time.
        cost: measures the time that a configuration takes.
        say: prints a line.

    Returns:
        The outcome of each cell, and the number of the signal that stopped the sweep, or 0.

    Raises:
        ValueError: the budget is too small, or differs from the one with which the sweep began.
        FileExistsError: another process carries out a sweep in this folder.
    """
    out.mkdir(parents=True, exist_ok=True)
    with lock_folder(out):
        if budget is not None:
            cells = apply_budget(cells, out / "sweep.json", parse_budget(budget), cost, say)
        return train_cells(cells, jobs, out / "logs")


def train_cells(cells: Sequence[Cell], jobs: int, logs: Path) -> tuple[list[Outcome], int]:
    """Train every unfinished cell, `jobs` at a time; a run that fails does not stop the others.

    Returns:
        The outcome of each cell, and the number of the signal that stopped the sweep, or 0.
    """
    outcomes, unfinished = sort_out_finished(cells)
    logs.mkdir(parents=True, exist_ok=True)
    threads = max(len(os.sched_getaffinity(0)) // jobs, 1)
    running: list[Job] = []
    queue = iter(unfinished)
    total = sum(cell.cfg.optim.epochs for cell in cells)
    with catch_signals() as requests, Bar("sweep", total, epochs_done(cells)) as bar, stop_at_exit(running):
        finished = len(cells) - len(unfinished)
        bar.say(f"{len(cells)} runs, {finished} of them finished; {jobs} at a time with {threads} threads each")
        while not requests.stop:
            running += [start_job(cell, threads, logs) for cell in itertools.islice(queue, jobs - len(running))]
            if not running:
                break
            for job in [job for job in running if job.process.poll() is not None]:
                running.remove(job)
                outcomes.append(job.outcome())
                bar.say(_outcome_line(outcomes[-1], len(outcomes), len(cells)))
            bar.update(epochs_done(cells), f"{len(outcomes)} of {len(cells)} runs")
            time.sleep(POLL_SECONDS)
    order = [cell.folder for cell in cells]
    return sorted(outcomes, key=lambda outcome: order.index(outcome.cell.folder)), requests.stop


def sort_out_finished(cells: Sequence[Cell]) -> tuple[list[Outcome], list[Cell]]:
    """Return the outcomes of the cells that are finished or have an unusable folder, and the cells to train."""
    outcomes: list[Outcome] = []
    unfinished: list[Cell] = []
    for cell in cells:
        try:
            if is_finished(cell):
                outcomes.append(Outcome(cell))
            else:
                unfinished.append(cell)
        except (ValueError, OSError) as error:
            outcomes.append(Outcome(cell, str(error)))
    return outcomes, unfinished


def is_finished(cell: Cell) -> bool:
    """Return True if the cell's run is finished.

    Raises:
        ValueError, OSError: its folder holds another run, or other files.
    """
    run = RunFolder(cell.folder)
    if run.exists():
        run.check_same(cell.cfg)
    return run.exists() and (cell.folder / "summary.json").is_file()


def epochs_done(cells: Sequence[Cell]) -> int:
    """Return the number of epochs that the cells' runs have recorded, all together."""
    epochs = 0
    for cell in cells:
        with contextlib.suppress(OSError):
            epochs += (cell.folder / "metrics.jsonl").read_bytes().count(b"\n")
    return epochs


@dataclass
class Job:
    """A run in progress. Its process group is its own, so that Ctrl-C reaches it only through this process."""

    cell: Cell
    process: subprocess.Popen[bytes]
    log: Path

    def outcome(self) -> Outcome:
        """Return the outcome of the process, which has ended."""
        if self.process.returncode == 0 and is_finished(self.cell):
            return Outcome(self.cell)
        lines = self.log.read_text(errors="replace").strip().splitlines()
        message = lines[-1].strip() if lines else "no message"
        return Outcome(self.cell, f"exit code {self.process.returncode}: {message} (see {self.log})")


def start_job(cell: Cell, threads: int, logs: Path) -> Job:
    """Start or continue the cell's run in a process with this number of threads."""
    log = logs / f"{cell.folder.name}.log"
    command = [sys.executable, "-m", "multifire", "train", *train_args(cell)]
    command += ["--out", str(cell.folder), "--resume", "auto"]
    with log.open("ab") as file:
        process = subprocess.Popen(  # noqa: S603 - our own program, without a shell
            command, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, start_new_session=True,
            env={**os.environ, "OMP_NUM_THREADS": str(threads)},
        )  # fmt: skip
    return Job(cell, process, log)


@contextlib.contextmanager
def stop_at_exit(running: list[Job]) -> Iterator[None]:
    """At the end of the block, ask every running process for a checkpoint and a stop; kill one that does not stop."""
    try:
        yield
    finally:
        for job in running:
            job.process.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + STOP_SECONDS
        for job in running:
            try:
                job.process.wait(max(deadline - time.monotonic(), 0.1))
            except (subprocess.TimeoutExpired, KeyboardInterrupt):
                job.process.kill()
                job.process.wait()


def _outcome_line(outcome: Outcome, done: int, total: int) -> str:
    if outcome.error:
        return f"{done}/{total}  {outcome.cell.name}: failed, {outcome.error}"
    accuracy = RunFiles(outcome.cell.folder).accuracy
    return f"{done}/{total}  {outcome.cell.name}: " + ("-" if accuracy is None else f"{100 * accuracy:.2f} %")
