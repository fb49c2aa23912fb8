#!/usr/bin/env python3
"""Kill a training run at random moments, resume it each time, and compare its weights with an undisturbed run's.

usage: tools/kill_and_resume.py [--kills 20] [--seed 0] [--folder FOLDER]

The run writes a checkpoint after every step, and every other kill waits until one is being written. Prints the count of
kills, where each fell, and how many checkpoints it cut short; exits with 1 where the weights differ in any bit.
"""

import argparse
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from multifire.training.checkpoint import load_checkpoint, load_newest

OVERRIDES = "--data.limit 1024 --data.timesteps 2 --optim.epochs 12 --model.width 8 --checkpoint-every 1 --resume auto"


def start(out: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "multifire", "train", "digits", *OVERRIDES.split(), "--out", str(out)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def kill(out: Path, moment: random.Random, in_writing: bool) -> tuple[str, bool] | None:
    """Where the run stood when it was killed, and whether it was writing a checkpoint; None where it ended before."""
    last = out / "last.safetensors"
    process = start(out)
    before = written(last)
    while process.poll() is None and written(last) in (0.0, before):
        time.sleep(0.01)  # until it trains
    time.sleep(moment.uniform(0, 1.5))
    while in_writing and process.poll() is None and not any(out.glob(".last*.tmp")):
        pass  # a write takes milliseconds
    process.send_signal(signal.SIGKILL)
    _, said = process.communicate()
    if process.returncode != -signal.SIGKILL:
        assert process.returncode == 0, said
        return None
    newest = load_newest(last)
    assert newest is not None
    position = newest[0].position
    return f"epoch {position.epoch + 1}, step {position.step}", any(out.glob(".last*.tmp"))


def written(last: Path) -> float:
    """When the newest checkpoint was written; 0 where there is none yet, or it is being replaced."""
    try:
        return last.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def finish(out: Path) -> dict[str, torch.Tensor]:
    process = start(out)
    _, said = process.communicate()
    assert process.returncode == 0, said
    checkpoint = load_checkpoint(out / "last.safetensors")
    return checkpoint.model | {f"momentum of {name}": tensor for name, tensor in checkpoint.optimizer.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "multifire-kills")
    args = parser.parse_args()
    expected = finish(args.folder / "undisturbed")
    moment, killed, writing = random.Random(args.seed), 0, 0
    while killed < args.kills and (fell := kill(args.folder / "killed", moment, in_writing=killed % 2 == 1)):
        killed += 1
        writing += fell[1]
        print(f"kill {killed}: {fell[0]}{', while it wrote a checkpoint' if fell[1] else ''}", flush=True)
    found = finish(args.folder / "killed")
    same = found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)
    verdict = "the same" if same else "NOT the same"
    print(f"{killed} kills, {writing} of them while a checkpoint was written; the weights are {verdict}")
    return 0 if same and killed == args.kills else 1


if __name__ == "__main__":
    sys.exit(main())
