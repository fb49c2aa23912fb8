#!/usr/bin/env python3
"""Watch what a process holds while it trains: its memory after each step, and how many files it has open.

usage: tools/watch_memory.py [--steps 2000] [--warm-up 200]

Trains a narrow network on the embedded digits by the real loop, with a checkpoint every 10 steps and an evaluation
every 200. Prints the slope of a straight line through the memory after the warm-up, in KB a step; exits with 1 where
it is above 1, or where the number of open files changed.
"""

import argparse
import os
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

import multifire.training.loop as training
from multifire.config import TrainOptions, get_recipe

STEPS_PER_EPOCH, BATCH = 200, 16


def resident() -> int:
    """Bytes of this process in the machine's memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def watch(steps: int, folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Bytes of memory and number of open files after each of `steps` training steps."""
    digits, step = get_recipe("digits"), training.train_step
    cfg = replace(
        digits,
        data=replace(digits.data, limit=BATCH * STEPS_PER_EPOCH, timesteps=2),
        model=replace(digits.model, width=2),
        optim=replace(digits.optim, epochs=steps // STEPS_PER_EPOCH, batch_size=BATCH, ema_decay=0.99),
    )
    memory, files = [], []

    def watched(*args):
        done = step(*args)
        memory.append(resident())
        files.append(len(list(Path("/proc/self/fd").iterdir())))
        return done

    training.train_step = watched
    try:
        training.train(cfg, folder, TrainOptions(checkpoint_every="10"))
    finally:
        training.train_step = step
    return np.array(memory), np.array(files)


def slope(values: np.ndarray) -> float:
    """Of the straight line that fits them best, a step."""
    return float(np.polyfit(np.arange(len(values)), values, 1)[0])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--warm-up", type=int, default=200)
    args = parser.parse_args()
    torch.set_num_threads(1)  # a narrow network has no work for two
    with tempfile.TemporaryDirectory() as folder:
        memory, files = watch(args.steps, Path(folder) / "run")
    warm, open_files = memory[args.warm_up :], files[args.warm_up :]
    kilobytes = slope(warm) / 1e3
    print(
        f"{len(memory):,} steps: {warm[0] / 1e6:.1f} MB after step {args.warm_up}, {warm[-1] / 1e6:.1f} MB after the "
        f"last, at most {warm.max() / 1e6:.1f} MB; slope {kilobytes:+.3f} KB a step; "
        f"{open_files.min()} to {open_files.max()} open files"
    )
    return 0 if kilobytes <= 1 and open_files.min() == open_files.max() else 1


if __name__ == "__main__":
    sys.exit(main())
