#!/usr/bin/env python3
"""Kill a training run at random moments, resume it each time, and compare it with an uninterrupted run.

usage: tools/kill_and_resume.py [--kills 20] [--seed 0] [--folder FOLDER]

The run writes a checkpoint after every step. Before every second kill the program waits until a checkpoint is being
written. FOLDER must not contain runs of an earlier call.

Prints the epoch and step of each kill, and whether a checkpoint was being written. Exits with 0 if all kills were made
and the final weights and momenta equal those of the uninterrupted run to the last bit, else with 1.
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
    """Start or resume the run in the folder `out`."""
    command = [sys.executable, "-m", "multifire", "train", "digits", *OVERRIDES.split(), "--out", str(out)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def resume_and_kill(out: Path, rng: random.Random, while_writing: bool) -> tuple[str, bool] | None:
    """Start or resume the run, and kill it after a random time.

    Args:
        out: the folder of the run.
        rng: chooses the time.
        while_writing: after the random time, wait until a checkpoint is being written.

    Returns:
        The position of the newest checkpoint as text, and whether the kill interrupted the writing of a checkpoint;
        None if the run ended before.
    """
    last = out / "last.safetensors"
    process = start(out)
    previous_time = modification_time(last)
    while process.poll() is None and modification_time(last) in (0.0, previous_time):
        time.sleep(0.01)  # wait for the first checkpoint of this process
    time.sleep(rng.uniform(0, 1.5))
    while while_writing and process.poll() is None and not any(out.glob(".last*.tmp")):
        pass  # without sleep, because writing takes only milliseconds
    process.send_signal(signal.SIGKILL)
    _, errors = process.communicate()
    if process.returncode != -signal.SIGKILL:
        assert process.returncode == 0, errors
        return None
    newest = load_newest(last)
    assert newest is not None
    position = newest[0].position
    return f"epoch {position.epoch + 1}, step {position.step}", any(out.glob(".last*.tmp"))


def modification_time(path: Path) -> float:
    """Return the time at which the file was last written, or 0 if it does not exist."""
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def finish(out: Path) -> dict[str, torch.Tensor]:
    """Run the training to its end; return the final weights and momenta."""
    process = start(out)
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    checkpoint = load_checkpoint(out / "last.safetensors")
    return checkpoint.model | {f"momentum of {name}": tensor for name, tensor in checkpoint.optimizer.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="number of kills (default: 20)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the times of the kills (default: 0)")
    default_folder = Path(tempfile.gettempdir()) / "multifire-kills"
    parser.add_argument(
        "--folder", type=Path, default=default_folder, help=f"folder for the two runs (default: {default_folder})"
    )
    args = parser.parse_args()
    expected = finish(args.folder / "undisturbed")
    rng, kills, kills_while_writing = random.Random(args.seed), 0, 0
    while kills < args.kills and (killed := resume_and_kill(args.folder / "killed", rng, while_writing=kills % 2 == 1)):
        position, was_writing = killed
        kills += 1
        kills_while_writing += was_writing
        print(f"kill {kills}: {position}{', while a checkpoint was being written' if was_writing else ''}", flush=True)
    found = finish(args.folder / "killed")
    same = found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)
    comparison = "equal" if same else "DO NOT equal"
    print(
        f"{kills} kills, {kills_while_writing} of them while a checkpoint was being written; the weights and momenta "
        f"{comparison} those of the uninterrupted run"
    )
    return 0 if same and kills == args.kills else 1


if __name__ == "__main__":
    sys.exit(main())
