"""`python -m benchmarks`: measure the parts that are named, append to the results, write the page."""

import argparse
import contextlib
import ctypes.util
import importlib.util
import itertools
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks import results
from benchmarks.cases import CIFAR10, CIFAR10_DVS, GESTURE, Case
from benchmarks.contestants import Contestant
from benchmarks.peers import KITS
from benchmarks.worker import peak_of_steps, workers
from multifire.utils.files import hold_lock

ROOT = Path(__file__).parents[1]
WARM_UP = 2


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], help=f"of {', '.join(PARTS)} (default: all)")
    parser.add_argument("--runs", type=int, default=7, help="counted runs of each call (default: 7)")
    parser.add_argument("--threads", type=int, default=2, help="threads of every contestant (default: 2)")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="folder of the CSV files")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "benchmarks.md", help="page of tables to write")
    parser.add_argument("--lock", type=Path, help="file to lock for each round of runs, against other measurements")
    args = parser.parse_args(argv)
    if args.runs < 1 or args.threads < 1:
        parser.error(f"--runs is {args.runs} and --threads {args.threads}, expected at least 1")
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # as the command line of multifire does
    with tempfile.TemporaryDirectory() as cache:  # so that what is compiled, is compiled here
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
        for part in args.parts or PARTS:
            say(f"{part} ...")
            columns, rows = PARTS[part](part, args)
            results.write_csv(args.out / f"{part}.csv", columns, rows)
    args.page.parent.mkdir(exist_ok=True)
    args.page.write_text(results.page(args.out))
    say(f"written to {args.out} and {args.page}")
    return 0


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def alternate(
    asked: Sequence[Any], what: str, runs: int, lock: Path | None = None
) -> tuple[list[list[float]], list[tuple[float, float]]]:
    """Seconds of each one's counted runs, in turns A B C A B C; and the seconds and the value of its first."""
    seconds: list[list[float]] = [[] for _ in asked]
    first: list[tuple[float, float]] = []
    for number in range(-WARM_UP, runs):
        with hold_lock(lock) if lock else contextlib.nullcontext():  # one measurement at a time
            took = [worker.ask(what) for worker in asked]
        first = first or took
        if number >= 0:
            for own, (each, _) in zip(seconds, took, strict=True):
                own.append(each)
    return seconds, first


def time_them(part: str, contestants: Sequence[Contestant], args, whats=("training step", "evaluation")) -> list[dict]:
    """Rows of the contestants' times, in turns, with ratios to the first and to the floor; peaks beside the steps.

    What is compiled only trains: its evaluation and its peak would compile for minutes once more.
    """
    rows = []
    with workers(contestants, args.threads) as started:
        for what in whats:
            asked = [(c, worker) for c, worker in zip(contestants, started, strict=True) if what in calls_of(c)]
            seconds, first = alternate([worker for _, worker in asked], CALLS[what], args.runs, args.lock)
            floors = {c.precision: own for (c, _), own in zip(asked, seconds, strict=True) if c.framework == "floor"}
            for number, (contestant, worker) in enumerate(asked):
                say(f"  {what}, {contestant.framework}, {contestant.settings}: {seconds[number]}")
                rows.append(
                    describe(part, contestant, worker.ask("machine"))
                    | {"what": what, "first_call_s": first[number][0], "loss": first[number][1]}
                    | results.summary(seconds[number], seconds[0])
                )
                if floor := floors.get(contestant.precision):
                    rows[-1]["floor_ratio"] = results.ratio(seconds[number], floor)
    for row, contestant in zip(rows, contestants, strict=False):  # the first rows are the training steps
        if contestant.framework != "floor" and not contestant.compiled:
            row["peak_bytes"] = peak_of_steps(contestant, args.threads)
    return rows


CALLS = {"training step": "step", "evaluation": "evaluate"}


def calls_of(contestant: Contestant) -> Sequence[str]:
    return ["training step"] if contestant.compiled else list(CALLS)


def describe(part: str, contestant: Contestant, machine: dict[str, Any]) -> dict[str, Any]:
    """What a row says of its contestant and of the machine."""
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
    """The peers that are here; says which are not."""
    here = [name for name in KITS if importlib.util.find_spec(name)]
    for name in KITS.keys() - set(here):
        say(f"  {name} is not installed, so it is left out; `make bench` installs it")
    return here


def precisions() -> list[str]:
    """fp32, and bf16 where the processor's convolutions have it."""
    import torch

    if torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return ["fp32", "bf16"]
    say("  this processor has no bf16 convolutions, so bf16 is left out")
    return ["fp32"]


def check(part: str, args) -> tuple[Sequence[str], list[dict]]:
    """Every peer's logits and gradients beside the reference's, in float64."""
    rows = []
    for case in (CIFAR10.with_(batch_size=2), GESTURE.with_(batch_size=2), CIFAR10_DVS.with_(batch_size=2)):
        rows += compare(part, [Contestant(name, case) for name in installed()], args)
    return results.CHECKS, rows


def check_compiled(part: str, args) -> tuple[Sequence[str], list[dict]]:
    """The same of what torch.compile makes of them and of the reference, on a network that compiles in minutes."""
    small = CIFAR10.with_(name="ds_resnet8", width=8, batch_size=2, timesteps=2)
    contestants = [Contestant(name, small, compiled=True) for name in ("reference", *installed())]
    return results.CHECKS, compare(part, contestants, args)


def compare(part: str, contestants: Sequence[Contestant], args) -> list[dict]:
    """Rows of the greatest differences to the reference.

    Raises:
        RuntimeError: one differs by more than 1e-8.
    """
    import numpy as np

    rows = []
    reference = Contestant("reference", contestants[0].case) if contestants else None
    for contestant in contestants:
        with workers([reference, contestant], args.threads, precise=True) as (first, second):
            expected, found, machine = first.ask("compare"), second.ask("compare"), second.ask("machine")
        assert expected.keys() == found.keys()
        off = {name: float(np.abs(found[name] - value).max() / np.abs(value).max()) for name, value in expected.items()}
        worst = max((name for name in off if name.startswith("∂")), key=off.__getitem__)
        row = describe(part, contestant, machine) | {name: off[name] for name in ("logits", "evaluated")}
        row |= {
            "settings": contestant.settings.replace("fp32", "float64"),
            "gradients": off[worst],
            "worst_gradient": worst,
        }
        say(f"  {contestant.framework}, {row['settings']}: {off['logits']}, {off['evaluated']}, {off[worst]} ({worst})")
        if not max(off.values()) <= 1e-8:
            raise RuntimeError(f"{contestant} differs from the reference: {off}")
        rows.append({name: row[name] for name in results.CHECKS})
    return rows


def spikes(part: str, args) -> tuple[Sequence[str], list[dict]]:
    """Shares of spikes that bf16 moves, of each layer.

    Raises:
        RuntimeError: the kernel's differ from the reference's in more than one of 10,000 neuron-steps of a layer.
    """
    rows = []
    for case in (CIFAR10, GESTURE, CIFAR10_DVS):
        contestant = Contestant("multifire", case, "bf16")
        with workers([contestant], args.threads) as (worker,):
            machine, moved = worker.ask("machine"), worker.ask("moved")
        for layer, values in moved.items():
            say(f"  {case.cfg.recipe}, {layer}: {values}")
            row = describe(part, contestant, machine) | {"layer": layer}
            rows.append(row | dict(zip(results.MOVED, values, strict=True)))
    if not max(row["kernel_moved"] for row in rows) <= 1e-4:
        raise RuntimeError("the kernel's spikes in bf16 differ from the reference's; the lines above say where")
    return results.SPIKES, rows


def settings_of_spikingjelly(part: str, args) -> tuple[Sequence[str], list[dict]]:
    """SpikingJelly's training step under each of its settings."""
    contestants = [
        Contestant("spikingjelly", CIFAR10, precision, compiled, channels_last)
        for precision in precisions()
        for compiled in (False, True)
        for channels_last in (False, True)
    ]
    return results.TIMES, time_them(part, contestants, args, ["training step"]) if "spikingjelly" in installed() else []


def fastest_spikingjelly(case: Case, args) -> Contestant:
    """SpikingJelly with the settings that were the fastest on the CIFAR-10 network."""
    rows = results.read_csv(args.out / "spikingjelly.csv")
    if not rows:
        return Contestant("spikingjelly", case)
    words = min(rows, key=lambda row: float(row["median_s"]))["settings"]
    return Contestant("spikingjelly", case, words.split(", ")[0], "compiled" in words, "channels-last" in words)


def cifar10(part: str, args) -> tuple[Sequence[str], list[dict]]:
    """Everybody on the CIFAR-10 network."""
    return results.TIMES, time_them(part, everybody(CIFAR10, args), args)


def everybody(case: Case, args) -> list[Contestant]:
    """Ours first, then the floor, both in every precision, then the reference and the peers.

    All keep freed memory, to which only multifire's command line sees; the fastest peer also stands as it comes.
    """
    ours = [Contestant(name, case, precision) for precision in precisions() for name in ("multifire", "floor")]
    peers = installed()
    jelly = [fastest_spikingjelly(case, args)] if "spikingjelly" in peers else []
    jelly += [replace(each, note="malloc as it comes", keeps_memory=False) for each in jelly]
    torch_ = [Contestant("snntorch", case)] if "snntorch" in peers else []
    compiled = [Contestant("reference", case, precision, compiled=True) for precision in precisions()]
    return [*ours, Contestant("reference", case), *compiled, *jelly, *torch_]


def events(case: Case):
    """A part: ours, the floor and the eager reference on a network for recordings."""

    def measure(part: str, args) -> tuple[Sequence[str], list[dict]]:
        ours = [Contestant(name, case, precision) for precision in precisions() for name in ("multifire", "floor")]
        return results.TIMES, time_them(part, [*ours, Contestant("reference", case)], args)

    return measure


def timesteps(part: str, args) -> tuple[Sequence[str], list[dict]]:
    """Ours for T = 4 to 64."""
    cases = [(t, CIFAR10.with_(timesteps=t)) for t in (4, 8, 16, 32, 64)]
    contestants = [Contestant("multifire", case, note=f"T = {t}") for t, case in cases]
    return results.TIMES, time_them(part, contestants, args, ["training step"])


def levels(part: str, args) -> tuple[Sequence[str], list[dict]]:
    """Ours for K = 1, 2, 3."""
    contestants = [Contestant("multifire", CIFAR10.with_(levels=k), note=f"K = {k}") for k in (1, 2, 3)]
    return results.TIMES, time_them(part, contestants, args, ["training step"])


def depth(part: str, args) -> tuple[Sequence[str], list[dict]]:
    """Peak and kept bytes of ours by depth."""
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
    return results.MEMORY, rows


def malloc(part: str, args) -> tuple[Sequence[str], list[dict]]:
    """Ours and the eager reference over the C library's malloc and over tcmalloc."""
    tcmalloc = ctypes.util.find_library("tcmalloc_minimal")
    if tcmalloc is None:
        say("  tcmalloc is not installed, so it is left out")
    mallocs = {"malloc of the C library": "", **({"tcmalloc": tcmalloc} if tcmalloc else {})}
    who = [*(("multifire", precision) for precision in precisions()), ("reference", "fp32")]
    contestants = [
        Contestant(name, CIFAR10, precision, note=note, preload=library)
        for name, precision in who
        for note, library in mallocs.items()
    ]
    return results.TIMES, time_them(part, contestants, args, ["training step"])


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
