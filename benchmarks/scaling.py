#!/usr/bin/env python3
"""What training gains from many processes, what it costs to agree on norms, and how fast data come.

usage: benchmarks/scaling.py PART... [--root data] [--rounds 7] [--steps 3] [--out FOLDER]

    throughput  cifar10-small, batches of 64, by the training loop's own steps: one process of two threads, two of one
                thread each (gloo), and two with --sync-norm. All are started first; then they train `steps` steps a
                round, in turns, while the others sleep
    spread      losses of the first 40 steps on the embedded digits in fp32: two processes with --sync-norm beside one,
                and one with another seed
    data        samples a second of the data path alone, one thread: digits, and cifar10 and nmnist where they are found

Writes scaling-PART.csv and prints a table of medians for docs/scaling.md.
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
class Way:
    """How a network is trained: by so many processes, of so many threads each."""

    name: str
    recipe: str
    processes: int = 1
    threads: int = 1
    sync_norm: bool = False
    seed: int = 0


WAYS = [
    Way("one process, two threads", "cifar10-small", threads=2),
    Way("two processes", "cifar10-small", 2),
    Way("two processes, --sync-norm", "cifar10-small", 2, sync_norm=True),
]
SPREAD = [
    Way("one process", "digits"),
    Way("two processes, --sync-norm", "digits", 2, sync_norm=True),
    Way("one process, another seed", "digits", seed=1),
]


def work(way: Way, root: str) -> None:
    """Train so many steps as a line of standard input says; answer with the seconds that they took and their losses."""
    import torch

    from multifire.config import TrainOptions, get_recipe
    from multifire.training.distributed import join_processes
    from multifire.training.guards import CheckpointTimer, save_and_stop_if_asked
    from multifire.training.meter import Meter
    from multifire.training.signals import Requests
    from multifire.training.state import set_up
    from multifire.training.step import train_step

    torch.set_num_threads(way.threads)
    recipe = get_recipe(way.recipe)
    data, optim = replace(recipe.data, root=root), replace(recipe.optim, batch_size=BATCH)
    cfg = replace(recipe, data=data, optim=optim, sync_norm=way.sync_norm, seed=way.seed)
    with join_processes() as processes:
        run = set_up(cfg, Path("unused"), TrainOptions(), processes, Requests())
        meter, timer, batches = Meter(run), CheckpointTimer(run.options), run.batches.train
        epoch = batches.epoch(0)
        for line in sys.stdin:
            losses, began = [], time.perf_counter()
            for x_TNCHW, y in itertools.islice(epoch, int(line)):
                samples, before = batches.order.size(run.position.step), run.position.loss_sum
                step = train_step(run.network, run.optimizer, x_TNCHW, y, cfg, samples, processes)
                meter.add(step)
                save_and_stop_if_asked(run, meter, timer, "measuring")
                if way in SPREAD:
                    meter.flush()
                    losses.append((run.position.loss_sum - before) / samples)
            meter.flush()
            print(json.dumps({"seconds": time.perf_counter() - began, "losses": losses}), flush=True)


@contextmanager
def at_work(way: Way, root: str) -> Iterator[list[subprocess.Popen]]:
    """The processes of a way, which wait to be told how many steps to train."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    shared = {"OMP_NUM_THREADS": str(way.threads), "OMP_WAIT_POLICY": "passive", "WORLD_SIZE": str(way.processes),
              "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}  # fmt: skip
    command = [sys.executable, "-m", "benchmarks.scaling", "--root", root, "--work", json.dumps(vars(way))]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    workers = [
        subprocess.Popen(command, env=os.environ | shared | {"RANK": str(rank)}, **pipes)
        for rank in range(way.processes)
    ]
    try:
        yield workers
    finally:
        for worker in workers:
            worker.stdin.close()  # pyright: ignore[reportOptionalMemberAccess]
        for worker in workers:
            worker.wait()


def tell(workers: list[subprocess.Popen], steps: int) -> dict[str, Any]:
    """Have them train so many steps; what the first of them answers."""
    for worker in workers:
        print(steps, file=worker.stdin, flush=True)
    answers = [worker.stdout.readline() for worker in workers]  # pyright: ignore[reportOptionalMemberAccess]
    if not all(answers):
        raise SystemExit("a worker ended before it answered; the lines above say why")
    return json.loads(answers[0])


def throughput(root: str, rounds: int, steps: int) -> list[dict[str, Any]]:
    rows = []
    with ExitStack() as stack:
        groups = {way: stack.enter_context(at_work(way, root)) for way in WAYS}
        for number in range(-1, rounds):  # the first warms up
            for way, workers in groups.items():
                rate = round(steps * BATCH / tell(workers, steps)["seconds"], 2)
                print(f"round {number}: {way.name}: {rate} images/s", file=sys.stderr, flush=True)
                if number >= 0:
                    rows.append({"way": way.name, "round": number, "images/s": rate})
    of = {way.name: [row["images/s"] for row in rows if row["way"] == way.name] for way in WAYS}
    print("| | images/s (min to max) | × one process (median of rounds; quartiles) |\n|---|---|---|")
    for name, found in of.items():
        # Of neighbours in a round, which share whatever else the machine was doing.
        low, middle, high = statistics.quantiles([a / b for a, b in zip(found, of[WAYS[0].name], strict=True)])
        rates = f"{statistics.median(found):.1f} ({min(found):.1f} to {max(found):.1f})"
        print(f"| {name} | {rates} | {middle:.2f} ({low:.2f} to {high:.2f}) |")
    return rows


def spread(root: str) -> list[dict[str, Any]]:
    losses = {}
    for way in SPREAD:
        with at_work(way, root) as workers:
            losses[way.name] = tell(workers, SPREAD_STEPS)["losses"]
    one, *others = losses
    print("| step | " + " | ".join(losses) + " |\n" + "|---" * (1 + len(losses)) + "|")
    for step in [0, 4, 9, 19, 29, 39]:
        print(f"| {step + 1} | " + " | ".join(f"{found[step]:.4f}" for found in losses.values()) + " |")
    for other in others:
        apart = [abs(a - b) for a, b in zip(losses[one], losses[other], strict=True)]
        print(f"{other}: apart by {statistics.fmean(apart):.4f} on average, {max(apart):.4f} at most")
    return [
        {"way": name, "step": 1 + n, "loss": loss} for name, found in losses.items() for n, loss in enumerate(found)
    ]


def data_path(root: str, rounds: int) -> list[dict[str, Any]]:
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
            print(f"{name}: left out: {error}")
            continue
        for number in range(-1, rounds):
            count, bytes_each, began = 0, 0, time.perf_counter()
            for x_TNCHW, y in itertools.islice(batches.epoch(max(number, 0)), 200):
                count += len(y)
                bytes_each = x_TNCHW.element_size() * x_TNCHW[:, 0].numel()
            if number >= 0:
                rate = count / (time.perf_counter() - began)
                rows.append({"data": name, "round": number, "samples/s": round(rate), "bytes of x": bytes_each})
    print("| data | samples/s, one thread (min to max) |\n|---|---|")
    for name in dict.fromkeys(row["data"] for row in rows):
        found = [row["samples/s"] for row in rows if row["data"] == name]
        print(f"| {name} | {statistics.median(found):,.0f} ({min(found):,} to {max(found):,}) |")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help="throughput, spread, data")
    parser.add_argument("--root", default="data")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--work", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        return work(Way(**json.loads(args.work)), args.root)
    parts = {
        "throughput": lambda: throughput(args.root, args.rounds, args.steps),
        "spread": lambda: spread(args.root),
        "data": lambda: data_path(args.root, args.rounds),
    }
    import torch

    from multifire.utils.device import processor

    print(f"{processor()}, {os.cpu_count()} cores; torch {torch.__version__}")
    for part in args.parts:
        rows = parts[part]()
        with (args.out / f"scaling-{part}.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
    return None


if __name__ == "__main__":
    main()
