#!/usr/bin/env python3
"""Measure multifire on one GPU, within a given number of minutes.

usage: python benchmarks/gpu.py --minutes M [--out FOLDER] [--parts PART ...] [--device auto|cpu|cuda]
       python benchmarks/gpu.py --page docs/gpu.md

The machine needs torch with Triton, NumPy, safetensors and this working tree. Other frameworks are read from wheels in
the folder --wheels, if they are not installed:

    python -m pip download --no-deps -d build/wheels spikingjelly==2.0.0 snntorch==1.0.0 loguru==0.7.3 tqdm==4.70.1

The parts run in this order, each writes the file gpu-PART.csv row by row, and the program ends in time:

    check    the op against its reference, some tests, and the losses of captured and of eager steps
    steps    training step and evaluation of the recipes beside their convolutions alone and a copy of the same bytes
    kernels  the time of each kernel of a step, and the bandwidth that those of the neurons reach
    epoch    epochs by the loop of `multifire train`, and the host's time between two replays of a step
    memory   the peak of a step, eager and captured, with packed and with unpacked spikes
    peers    SpikingJelly, snnTorch and the reference on the same network
    tune     other choices of tile, warps and registers for each kernel; only with --tune or --parts tune

On a CPU all parts run with tiny networks, to find mistakes before a GPU is at hand: captured functions are ordinary
ones, and Triton's interpreter computes. `multifire bench` measures one recipe with more detail.
"""

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from benchmarks.gpu_parts.bare import prepare_imports  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
PARTS = ("check", "steps", "kernels", "epoch", "memory", "peers")
EARLY = 3.0
"""Seconds that are left for the start and the end of the process."""


def main(argv: Sequence[str] | None = None) -> int:
    start = time.monotonic()
    args = _parser().parse_args(argv)
    prepare_imports(args.wheels)
    if args.page:
        from benchmarks.gpu_parts.page import page

        args.page.write_text(page(args.out))
        return 0
    _measure(args, start + 60 * args.minutes - EARLY)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="benchmarks/gpu.py", description="See the head of the file.")
    wanted = parser.add_mutually_exclusive_group(required=True)
    wanted.add_argument("--minutes", type=float, help="end after this time")
    wanted.add_argument("--page", type=Path, help="measure nothing, write the page of tables to this file")
    parser.add_argument("--parts", nargs="+", choices=[*PARTS, "tune"], help="run these parts, in this order")
    parser.add_argument("--tune", action="store_true", help="run the part `tune` too, at the end")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (default: auto)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the CSV files")
    parser.add_argument("--root", type=Path, help="folder with CIFAR-10 for the part `epoch` (default: random images)")
    parser.add_argument("--wheels", type=Path, default=ROOT / "build" / "wheels", help="folder with wheels of peers")
    parser.add_argument("--done", type=int, default=0, help=argparse.SUPPRESS)  # items of the first part; see `runner`
    return parser


def _measure(args: argparse.Namespace, deadline: float) -> None:
    from multifire.utils.device import pick_device

    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else torch's profiler prints; torch reads it when imported
    device = pick_device(args.device)
    if device.type == "cpu":
        import torch

        torch.set_num_threads(1)  # threads only wait for each other in networks of this size
        os.environ.setdefault("TRITON_INTERPRET", "1")  # before multifire.ops is imported

    from benchmarks.gpu_parts.runner import BrokenDevice, run
    from benchmarks.gpu_parts.setting import Setting

    parts = args.parts or [*PARTS, *(["tune"] if args.tune else [])]
    try:
        run(parts, Setting(device, args.root), args.out, deadline, args.done)
    except BrokenDevice as broken:
        _restart(args, deadline, broken.parts, broken.done)


def _restart(args: argparse.Namespace, deadline: float, parts: Sequence[str], done: int) -> None:
    """Replace this process by a new one, in which the device works again."""
    print("the device is broken: a new process goes on", flush=True)
    root = [] if args.root is None else ["--root", str(args.root)]
    command = [
        sys.executable, __file__, "--minutes", str((deadline + EARLY - time.monotonic()) / 60), "--out", str(args.out),
        "--device", args.device, "--wheels", str(args.wheels), *root, "--done", str(done), "--parts", *parts,
    ]  # fmt: skip
    os.execv(sys.executable, command)


if __name__ == "__main__":
    sys.exit(main())
