#!/usr/bin/env python3
"""Measure the memory and the number of open files of a training process after each step, to detect leaks.

usage: tools/watch_memory.py [--steps 2000] [--warm-up 200]

Trains a narrow network on the embedded digits with multifire's training loop, with a checkpoint every 10 steps and an
evaluation every 200 steps. Fits a straight line to the memory after the warm-up and prints its slope. Exits with 1 if
the slope is more than 1 KB per step, or if the number of open files changed; else with 0.
"""

import argparse
import os
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from multifire.config import TrainOptions, get_recipe
from multifire.training import captured
from multifire.training.loop import train

STEPS_PER_EPOCH, BATCH = 200, 16


def resident() -> int:
    """Return the resident memory of this process in bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def watch(steps: int, folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Train for `steps` steps; return the resident bytes [steps] and the number of open files [steps] after each."""
    digits, train_step = get_recipe("digits"), captured.train_step
    cfg = replace(
        digits,
        data=replace(digits.data, limit=BATCH * STEPS_PER_EPOCH, timesteps=2),
        model=replace(digits.model, width=2),
        optim=replace(digits.optim, epochs=steps // STEPS_PER_EPOCH, batch_size=BATCH, ema_decay=0.99),
    )
    memory, files = [], []

    def watched_step(*args):
        result = train_step(*args)
        memory.append(resident())
        files.append(len(list(Path("/proc/self/fd").iterdir())))
        return result

    captured.train_step = watched_step
    try:
        train(cfg, folder, TrainOptions(checkpoint_every="10"))
    finally:
        captured.train_step = train_step
    return np.array(memory), np.array(files)


def slope(values: np.ndarray) -> float:
    """Return the slope per step of the straight line that fits the values best (least squares)."""
    return float(np.polyfit(np.arange(len(values)), values, 1)[0])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000, help="training steps, a multiple of 200 (default: 2000)")
    parser.add_argument("--warm-up", type=int, default=200, help="first steps to exclude (default: 200)")
    args = parser.parse_args()
    torch.set_num_threads(1)  # a second thread would not make a narrow network faster
    with tempfile.TemporaryDirectory() as folder:
        memory, files = watch(args.steps, Path(folder) / "run")
    measured_memory, open_files = memory[args.warm_up :], files[args.warm_up :]
    kilobytes = slope(measured_memory) / 1e3
    print(
        f"{len(memory):,} steps: {measured_memory[0] / 1e6:.1f} MB after step {args.warm_up + 1}, "
        f"{measured_memory[-1] / 1e6:.1f} MB after the last step, at most {measured_memory.max() / 1e6:.1f} MB; "
        f"slope {kilobytes:+.3f} KB per step; "
        f"{open_files.min()} to {open_files.max()} open files"
    )
    return 0 if kilobytes <= 1 and open_files.min() == open_files.max() else 1


if __name__ == "__main__":
    sys.exit(main())
