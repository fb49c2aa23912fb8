#!/usr/bin/env python3
"""Measure training with several processes, the cost of --sync-norm, and the speed of reading data.

usage: benchmarks/scaling.py PART... [--root data] [--rounds 7] [--steps 3] [--out FOLDER]

Run it in the root folder of the repository. PART is one or more of:

    throughput  Train cifar10-small with batches of 64, by the steps of the training loop, in three setups: one process
                with two threads, two processes with one thread each (gloo), and the same with --sync-norm. All
                processes start first. Then the setups train STEPS steps in each round, in turns; the others wait.
    spread      Compare the losses of the first 40 steps on the embedded digits in fp32: one process, two processes with
                --sync-norm, and one process with another seed.
    data        Measure the samples per second of reading and preparing batches with one thread: digits, and cifar10 and
                nmnist if they are in the data folder.

Writes scaling-PART.csv and prints a Markdown table of medians for docs/scaling.md.
"""

import argparse
import csv
import itertools
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
BATCH, SPREAD_STEPS = 64, 40


@dataclass(frozen=True)
class Setup:
    """A recipe, and the processes that train it together."""

    name: str
    recipe: str
    processes: int = 1
    threads: int = 1
    """Threads of each process."""
    sync_norm: bool = False
    seed: int = 0


THROUGHPUT_SETUPS = [
    Setup("one process, two threads", "cifar10-small", threads=2),
    Setup("two processes", "cifar10-small", 2),
    Setup("two processes, --sync-norm", "cifar10-small", 2, sync_norm=True),
]
SPREAD_SETUPS = [
    Setup("one process", "digits"),
    Setup("two processes, --sync-norm", "digits", 2, sync_norm=True),
    Setup("one process, another seed", "digits", seed=1),
]


def serve_training(setup: Setup, root: str) -> None:
    """Read numbers of steps from standard input, a line each; train that many steps and print seconds and losses."""
    import torch

    from multifire.config import TrainOptions, get_recipe
    from multifire.training.distributed import process_group
    from multifire.training.guards import CheckpointTimer, save_and_stop_if_asked
    from multifire.training.meter import Meter
    from multifire.training.signals import Requests
    from multifire.training.state import set_up
    from multifire.training.step import train_step

    torch.set_num_threads(setup.threads)
    recipe = get_recipe(setup.recipe)
    data, optim = replace(recipe.data, root=root), replace(recipe.optim, batch_size=BATCH)
    cfg = replace(recipe, data=data, optim=optim, sync_norm=setup.sync_norm, seed=setup.seed)
    with process_group() as processes:
        run = set_up(cfg, Path("unused"), TrainOptions(), processes, Requests())
        meter, timer, batches = Meter(run), CheckpointTimer(run.options), run.batches.train
        epoch = batches.epoch(0)
        for line in sys.stdin:
            losses, start = [], time.perf_counter()
            for x_TNCHW, y in itertools.islice(epoch, int(line)):
                samples, previous_loss_sum = batches.order.size(run.position.step), run.position.loss_sum
                result = train_step(run.network, run.optimizer, x_TNCHW, y, cfg, samples, processes)
                meter.add(result)
                save_and_stop_if_asked(run, meter, timer, "measuring")
                if setup in SPREAD_SETUPS:
                    meter.flush()
                    losses.append((run.position.loss_sum - previous_loss_sum) / samples)
            meter.flush()
            print(json.dumps({"seconds": time.perf_counter() - start, "losses": losses}), flush=True)


@contextmanager
def start_workers(setup: Setup, root: str) -> Iterator[list[subprocess.Popen]]:
    """Start the processes of a setup, which wait for `train_steps`; end them when the context ends."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    environment = os.environ | {
        "OMP_NUM_THREADS": str(setup.threads),
        "OMP_WAIT_POLICY": "passive",
        "WORLD_SIZE": str(setup.processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }
    command = [sys.executable, "-m", "benchmarks.scaling", "--root", root, "--work", json.dumps(vars(setup))]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    workers = [
        subprocess.Popen(command, env=environment | {"RANK": str(rank)}, **pipes) for rank in range(setup.processes)
    ]
    try:
        yield workers
    finally:
        for worker in workers:
            worker.stdin.close()  # pyright: ignore[reportOptionalMemberAccess]
        for worker in workers:
            worker.wait()


def train_steps(workers: list[subprocess.Popen], steps: int) -> dict[str, Any]:
    """Let the processes train that many steps together; return the seconds and losses of the first process."""
    for worker in workers:
        print(steps, file=worker.stdin, flush=True)
    answers = [worker.stdout.readline() for worker in workers]  # pyright: ignore[reportOptionalMemberAccess]
    if not all(answers):
        raise SystemExit("a worker process ended before it answered; see its error message above")
    return json.loads(answers[0])


def throughput(root: str, rounds: int, steps: int) -> list[dict[str, Any]]:
    """Measure images per second of every setup in turns; print a table and return a row for each run."""
    rows = []
    with ExitStack() as stack:
        workers_of = {setup: stack.enter_context(start_workers(setup, root)) for setup in THROUGHPUT_SETUPS}
        for number in range(-1, rounds):  # round -1 is the warm-up and is not recorded
            for setup, workers in workers_of.items():
                rate = round(steps * BATCH / train_steps(workers, steps)["seconds"], 2)
                print(f"round {number}: {setup.name}: {rate} images/s", file=sys.stderr, flush=True)
                if number >= 0:
                    rows.append({"way": setup.name, "round": number, "images/s": rate})
    names = [setup.name for setup in THROUGHPUT_SETUPS]
    rates_of = {name: [row["images/s"] for row in rows if row["way"] == name] for name in names}
    print("| | images/s (min to max) | × one process (median of rounds; quartiles) |\n|---|---|---|")
    for name, rates in rates_of.items():
        # Ratios are taken within a round, because neighbouring runs see the same load of the machine.
        ratios = [rate / baseline for rate, baseline in zip(rates, rates_of[names[0]], strict=True)]
        low, median, high = statistics.quantiles(ratios)
        rate_text = f"{statistics.median(rates):.1f} ({min(rates):.1f} to {max(rates):.1f})"
        print(f"| {name} | {rate_text} | {median:.2f} ({low:.2f} to {high:.2f}) |")
    return rows


def spread(root: str) -> list[dict[str, Any]]:
    """Compare the losses of the setups; print a table and return a row for each setup and step."""
    losses = {}
    for setup in SPREAD_SETUPS:
        with start_workers(setup, root) as workers:
            losses[setup.name] = train_steps(workers, SPREAD_STEPS)["losses"]
    baseline, *others = losses
    print("| step | " + " | ".join(losses) + " |\n" + "|---" * (1 + len(losses)) + "|")
    for step in [0, 4, 9, 19, 29, 39]:
        print(f"| {step + 1} | " + " | ".join(f"{values[step]:.4f}" for values in losses.values()) + " |")
    for other in others:
        differences = [abs(a - b) for a, b in zip(losses[baseline], losses[other], strict=True)]
        mean, largest = statistics.fmean(differences), max(differences)
        print(f"{other}: the losses differ from those of {baseline} by {mean:.4f} on average, {largest:.4f} at most")
    return [
        {"way": name, "step": step, "loss": loss}
        for name, values in losses.items()
        for step, loss in enumerate(values, 1)
    ]


def data_path(root: str, rounds: int) -> list[dict[str, Any]]:
    """Measure the samples per second of reading and preparing batches; print a table and return a row for each run."""
    import torch

    from multifire.config import get_recipe
    from multifire.training.data import load_batches

    torch.set_num_threads(1)
    rows = []
    for name in ("digits", "cifar10", "nmnist"):
        cfg = get_recipe(name)
        try:
            batches = load_batches(replace(cfg, data=replace(cfg.data, root=root)), torch.device("cpu")).train
        except FileNotFoundError as error:
            print(f"{name}: skipped: {error}")
            continue
        for number in range(-1, rounds):
            count, bytes_of_sample, start = 0, 0, time.perf_counter()
            for x_TNCHW, y in itertools.islice(batches.epoch(max(number, 0)), 200):
                count += len(y)
                bytes_of_sample = x_TNCHW.element_size() * x_TNCHW[:, 0].numel()
            if number >= 0:
                rate = round(count / (time.perf_counter() - start))
                rows.append({"data": name, "round": number, "samples/s": rate, "bytes of x": bytes_of_sample})
    print("| data | samples/s, one thread (min to max) |\n|---|---|")
    for name in dict.fromkeys(row["data"] for row in rows):
        rates = [row["samples/s"] for row in rows if row["data"] == name]
        print(f"| {name} | {statistics.median(rates):,.0f} ({min(rates):,} to {max(rates):,}) |")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help="throughput, spread or data")
    parser.add_argument("--root", default="data", help="folder of the data sets (default: data)")
    parser.add_argument("--rounds", type=int, default=7, help="measured rounds of throughput and data (default: 7)")
    parser.add_argument("--steps", type=int, default=3, help="training steps in a round of throughput (default: 3)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="existing folder for the CSV files")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        return serve_training(Setup(**json.loads(args.work)), args.root)
    parts = {
        "throughput": lambda: throughput(args.root, args.rounds, args.steps),
        "spread": lambda: spread(args.root),
        "data": lambda: data_path(args.root, args.rounds),
    }
    import torch

    from multifire.utils.device import processor

    print(f"{processor()}, {os.cpu_count()} cores; torch {torch.__version__}")
    args.out.mkdir(parents=True, exist_ok=True)
    for part in args.parts:
        rows = parts[part]()
        with (args.out / f"scaling-{part}.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
    return None


if __name__ == "__main__":
    main()
