"""`python -m benchmarks`: measure the named parts, write one CSV file for each, and write the page of tables.

A contestant is a framework with its settings and a network. Each contestant runs in a worker process of its own.
"""

import argparse
import contextlib
import ctypes.util
import importlib.util
import itertools
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks import tables
from benchmarks.cases import CIFAR10, CIFAR10_DVS, GESTURE, Case
from benchmarks.contestants import Contestant
from benchmarks.peers import PEER_FRAMEWORKS
from benchmarks.worker import peak_of_steps, workers
from multifire.utils.files import hold_lock

ROOT = Path(__file__).parents[1]
WARM_UP_RUNS = 2
MAX_DIFFERENCE = 1e-8
"""Largest allowed difference from the reference in float64, relative to the largest value of the same tensor."""
MAX_MOVED_SPIKES = 1e-4
"""Largest allowed fraction of a layer's neuron-steps at which the kernel and the reference differ in bf16."""


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], help=f"any of {', '.join(PARTS)} (default: all)")
    parser.add_argument("--runs", type=int, default=7, help="measured runs of each call (default: 7)")
    parser.add_argument("--threads", type=int, default=2, help="threads of each contestant (default: 2)")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="folder for the CSV files")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "benchmarks.md", help="Markdown page to write")
    parser.add_argument(
        "--lock", type=Path, help="file that is locked during each round of runs, so that only one benchmark measures"
    )
    args = parser.parse_args(argv)
    if args.runs < 1 or args.threads < 1:
        parser.error(f"--runs is {args.runs} and --threads is {args.threads}; both must be at least 1")
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # multifire's command line sets it too
    with tempfile.TemporaryDirectory() as cache:  # an empty cache, so that first calls include the compilation
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
        for part in args.parts or PARTS:
            say(f"{part} ...")
            columns, rows = PARTS[part](part, args)
            tables.write_csv(args.out / f"{part}.csv", columns, rows)
    args.page.parent.mkdir(exist_ok=True)
    args.page.write_text(tables.page(args.out))
    say(f"wrote the CSV files to {args.out} and the page to {args.page}")
    return 0


def say(line: str) -> None:
    """Print a line of progress on standard error."""
    print(line, file=sys.stderr, flush=True)


def alternate(
    asked: Sequence[Any], what: str, runs: int, lock: Path | None = None
) -> tuple[list[list[float]], list[tuple[float, float]]]:
    """Time the call `what` in each worker in turns: A B C A B C ...

    Args:
        asked: the workers.
        what: the request to send, such as "step".
        runs: number of measured runs of each worker, after WARM_UP_RUNS runs that are not measured.
        lock: a file to lock during each round.

    Returns:
        The seconds of the measured runs of each worker, and the (seconds, returned value) of its very first run.
    """
    seconds: list[list[float]] = [[] for _ in asked]
    first_run: list[tuple[float, float]] = []
    for number in range(-WARM_UP_RUNS, runs):
        with hold_lock(lock) if lock else contextlib.nullcontext():
            answers = [worker.ask(what) for worker in asked]
        first_run = first_run or answers
        if number >= 0:
            for worker_seconds, (elapsed, _) in zip(seconds, answers, strict=True):
                worker_seconds.append(elapsed)
    return seconds, first_run


def time_them(part: str, contestants: Sequence[Contestant], args, whats=("training step", "evaluation")) -> list[dict]:
    """Time the calls `whats` of the contestants in turns; measure the peak memory of their training steps.

    Compiled contestants only train: measuring their evaluation or their memory would need minutes of compilation each.

    Returns:
        A row for each contestant and call, with the ratios of its times to those of the first contestant and to those
        of the floor in the same precision.
    """
    rows = []
    with workers(contestants, args.threads) as started:
        for what in whats:
            selected = [(c, worker) for c, worker in zip(contestants, started, strict=True) if what in calls_of(c)]
            seconds, first_run = alternate([worker for _, worker in selected], REQUESTS[what], args.runs, args.lock)
            floor_seconds = {
                contestant.precision: times
                for (contestant, _), times in zip(selected, seconds, strict=True)
                if contestant.framework == "floor"
            }
            for index, (contestant, worker) in enumerate(selected):
                say(f"  {what}, {contestant.framework}, {contestant.settings}: {seconds[index]}")
                rows.append(
                    describe(part, contestant, worker.ask("machine"))
                    | {"what": what, "first_call_s": first_run[index][0], "loss": first_run[index][1]}
                    | tables.summary(seconds[index], seconds[0])
                )
                if floor := floor_seconds.get(contestant.precision):
                    rows[-1]["floor_ratio"] = tables.ratio(seconds[index], floor)
    for row, contestant in zip(rows, contestants, strict=False):  # the first rows are those of the training steps
        if contestant.framework != "floor" and not contestant.compiled:
            row["peak_bytes"] = peak_of_steps(contestant, args.threads)
    return rows


REQUESTS = {"training step": "step", "evaluation": "evaluate"}
"""Name of a timed call in the tables -> request to the worker."""


def calls_of(contestant: Contestant) -> Sequence[str]:
    """Return the names of the calls that are timed for this contestant."""
    return ["training step"] if contestant.compiled else list(REQUESTS)


def describe(part: str, contestant: Contestant, machine: dict[str, Any]) -> dict[str, Any]:
    """Return the columns of a row that describe the contestant and the machine."""
    model, (timesteps, batch, channels, size, _) = contestant.case.cfg.model, contestant.case.shape
    return {
        "part": part,
        "framework": contestant.framework,
        "settings": contestant.settings,
        "model": model.name,
        "width": model.width,
        "levels": model.levels,
        "timesteps": timesteps,
        "batch": batch,
        "channels": channels,
        "size": size,
        "processor": machine["processor"],
        "threads": machine["threads"],
        "kernel": machine["kernel"],
        "torch": machine["torch"],
        "framework_version": machine["framework"],
    }


def installed() -> list[str]:
    """Return the names of the peer frameworks that are installed; print the names of the others."""
    found = [name for name in PEER_FRAMEWORKS if importlib.util.find_spec(name)]
    for name in PEER_FRAMEWORKS.keys() - set(found):
        say(f"  {name} is not installed and is skipped; `make bench` installs it")
    return found


def precisions() -> list[str]:
    """Return "fp32", and "bf16" if oneDNN has bf16 convolutions for this processor."""
    import torch

    if torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return ["fp32", "bf16"]
    say("  this processor has no bf16 convolutions, so bf16 is skipped")
    return ["fp32"]


def check(part: str, args) -> tuple[Sequence[str], list[dict]]:
    """Compare the logits and gradients of every peer framework with those of the reference in float64."""
    rows = []
    for case in (CIFAR10.with_(batch_size=2), GESTURE.with_(batch_size=2), CIFAR10_DVS.with_(batch_size=2)):
        rows += compare(part, [Contestant(name, case) for name in installed()], args)
    return tables.CHECKS, rows


def check_compiled(part: str, args) -> tuple[Sequence[str], list[dict]]:
    """Compare the compiled reference and the compiled peers with the reference, on a network that compiles quickly."""
    small = CIFAR10.with_(name="ds_resnet8", width=8, batch_size=2, timesteps=2)
    contestants = [Contestant(name, small, compiled=True) for name in ("reference", *installed())]
    return tables.CHECKS, compare(part, contestants, args)


def compare(part: str, contestants: Sequence[Contestant], args) -> list[dict]:
    """Return a row for each contestant with its largest differences from the reference.

    Raises:
        RuntimeError: a difference is larger than MAX_DIFFERENCE.
    """
    import numpy as np

    rows = []
    reference = Contestant("reference", contestants[0].case) if contestants else None
    for contestant in contestants:
        pair = [reference, contestant]
        with workers(pair, args.threads, use_float64=True) as (reference_worker, worker):
            expected, found = reference_worker.ask("compare"), worker.ask("compare")
            machine = worker.ask("machine")
        assert expected.keys() == found.keys()
        difference = {
            name: float(np.abs(found[name] - value).max() / np.abs(value).max()) for name, value in expected.items()
        }
        worst_gradient = max((name for name in difference if name.startswith("∂")), key=difference.__getitem__)
        row = describe(part, contestant, machine) | {
            "settings": contestant.settings.replace("fp32", "float64"),
            "logits": difference["logits"],
            "evaluated": difference["evaluated"],
            "gradients": difference[worst_gradient],
            "worst_gradient": worst_gradient,
        }
        say(
            f"  {contestant.framework}, {row['settings']}: largest relative differences: logits {row['logits']}, "
            f"logits in evaluation {row['evaluated']}, gradients {row['gradients']} ({worst_gradient})"
        )
        if not max(difference.values()) <= MAX_DIFFERENCE:
            raise RuntimeError(f"{contestant} differs from the reference: {difference}")
        rows.append({name: row[name] for name in tables.CHECKS})
    return rows


def spikes(part: str, args) -> tuple[Sequence[str], list[dict]]:
    """Measure for each layer the fraction of its spikes that differ because of bf16.

    Raises:
        RuntimeError: in a layer, the kernel and the reference differ at more than MAX_MOVED_SPIKES of the neuron-steps.
    """
    rows = []
    for case in (CIFAR10, GESTURE, CIFAR10_DVS):
        contestant = Contestant("multifire", case, "bf16")
        with workers([contestant], args.threads) as (worker,):
            machine, moved = worker.ask("machine"), worker.ask("moved")
        for layer, values in moved.items():
            figures = dict(zip(tables.MOVED, values, strict=True))
            say(f"  {case.cfg.recipe}, {layer}: {figures}")
            rows.append(describe(part, contestant, machine) | {"layer": layer} | figures)
    if not max(row["kernel_moved"] for row in rows) <= MAX_MOVED_SPIKES:
        raise RuntimeError(
            f"the kernel's spikes in bf16 differ from those of the reference: kernel_moved in the lines above is more "
            f"than {MAX_MOVED_SPIKES}"
        )
    return tables.SPIKES, rows


def settings_of_spikingjelly(part: str, args) -> tuple[Sequence[str], list[dict]]:
    """Time a training step of SpikingJelly with every combination of its settings."""
    contestants = [
        Contestant("spikingjelly", CIFAR10, precision, compiled, channels_last)
        for precision in precisions()
        for compiled in (False, True)
        for channels_last in (False, True)
    ]
    return tables.TIMES, time_them(part, contestants, args, ["training step"]) if "spikingjelly" in installed() else []


def fastest_spikingjelly(case: Case, args) -> Contestant:
    """Return SpikingJelly with its fastest settings in spikingjelly.csv, or default settings without that file."""
    rows = tables.read_csv(args.out / "spikingjelly.csv")
    if not rows:
        return Contestant("spikingjelly", case)
    settings = min(rows, key=lambda row: float(row["median_s"]))["settings"]
    precision = settings.split(", ")[0]
    return Contestant("spikingjelly", case, precision, "compiled" in settings, "channels-last" in settings)


def cifar10(part: str, args) -> tuple[Sequence[str], list[dict]]:
    """Time all contestants on the CIFAR-10 network."""
    return tables.TIMES, time_them(part, everybody(CIFAR10, args), args)


def everybody(case: Case, args) -> list[Contestant]:
    """Return all contestants: multifire and the floor in every precision, the reference, then the peer frameworks.

    Every process keeps freed memory for reuse, as multifire's command line does. SpikingJelly is also measured with
    malloc's default settings.
    """
    multifire = [Contestant(name, case, precision) for precision in precisions() for name in ("multifire", "floor")]
    peers = installed()
    spikingjelly = [fastest_spikingjelly(case, args)] if "spikingjelly" in peers else []
    spikingjelly += [replace(each, note="default malloc", keeps_memory=False) for each in spikingjelly]
    snntorch = [Contestant("snntorch", case)] if "snntorch" in peers else []
    compiled = [Contestant("reference", case, precision, compiled=True) for precision in precisions()]
    return [*multifire, Contestant("reference", case), *compiled, *spikingjelly, *snntorch]


def events(case: Case) -> Callable[[str, Any], tuple[Sequence[str], list[dict]]]:
    """Return a part that times multifire, the floor and the eager reference on a network for event recordings."""

    def measure(part: str, args) -> tuple[Sequence[str], list[dict]]:
        multifire = [Contestant(name, case, precision) for precision in precisions() for name in ("multifire", "floor")]
        return tables.TIMES, time_them(part, [*multifire, Contestant("reference", case)], args)

    return measure


def timesteps(part: str, args) -> tuple[Sequence[str], list[dict]]:
    """Time a training step of multifire for T = 4 to 64."""
    cases = [(t, CIFAR10.with_(timesteps=t)) for t in (4, 8, 16, 32, 64)]
    contestants = [Contestant("multifire", case, note=f"T = {t}") for t, case in cases]
    return tables.TIMES, time_them(part, contestants, args, ["training step"])


def levels(part: str, args) -> tuple[Sequence[str], list[dict]]:
    """Time a training step of multifire for K = 1, 2 and 3."""
    contestants = [Contestant("multifire", CIFAR10.with_(levels=k), note=f"K = {k}") for k in (1, 2, 3)]
    return tables.TIMES, time_them(part, contestants, args, ["training step"])


def depth(part: str, args) -> tuple[Sequence[str], list[dict]]:
    """Measure multifire's peak memory, and the memory that autograd keeps for the backward pass, by depth."""
    rows = []
    for precision, layers in itertools.product(precisions(), (20, 32, 44, 68)):
        contestant = Contestant("multifire", CIFAR10.with_(name=f"ds_resnet{layers}", batch_size=8), precision)
        with workers([contestant], args.threads) as (worker,):
            machine, (kept, steps) = worker.ask("machine"), worker.ask("kept")
        peak = peak_of_steps(contestant, args.threads)
        say(f"  {layers} layers, {precision}: peak {peak}, kept {kept}")
        rows.append(
            describe(part, contestant, machine) | {"peak_bytes": peak, "kept_bytes": kept, "neuron_steps": steps}
        )
    return tables.MEMORY, rows


def malloc(part: str, args) -> tuple[Sequence[str], list[dict]]:
    """Time a training step of multifire and of the eager reference with the C library's malloc and with tcmalloc."""
    tcmalloc = ctypes.util.find_library("tcmalloc_minimal")
    if tcmalloc is None:
        say("  tcmalloc is not installed and is skipped")
    mallocs = {"malloc of the C library": "", **({"tcmalloc": tcmalloc} if tcmalloc else {})}
    frameworks = [*(("multifire", precision) for precision in precisions()), ("reference", "fp32")]
    contestants = [
        Contestant(name, CIFAR10, precision, note=note, preload=library)
        for name, precision in frameworks
        for note, library in mallocs.items()
    ]
    return tables.TIMES, time_them(part, contestants, args, ["training step"])


PARTS = {
    "check": check,
    "check-compiled": check_compiled,
    "spikes": spikes,
    "spikingjelly": settings_of_spikingjelly,
    "cifar10": cifar10,
    "dvs-gesture": events(GESTURE),
    "cifar10-dvs": events(CIFAR10_DVS),
    "timesteps": timesteps,
    "levels": levels,
    "depth": depth,
    "malloc": malloc,
}

if __name__ == "__main__":
    sys.exit(main())
