"""Several processes compute the same as one, use every sample once, and survive the death of a worker."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp

import multifire.training.captured as captured
from multifire.config import TrainOptions
from multifire.datasets.loader import Order
from multifire.training.checkpoint import load_checkpoint
from multifire.training.distributed import process_group
from multifire.training.signals import Requests
from multifire.training.state import set_up
from tests.test_train import TINY, override

STEPS = 20
# 128 samples in batches of 17: parts of 9 and 8; the last batch has 9 samples, in parts of 5 and 4.
UNEVEN = replace(override(TINY, optim={"batch_size": 17, "lr": 0.1}), backend="reference", sync_norm=True)


def first_losses(cfg) -> list[float]:
    """Return the losses of the first steps in float64, in which rounding flips no spike."""
    torch.set_default_dtype(torch.float64)
    losses = []
    with process_group() as processes:
        run = set_up(cfg, Path("unused"), TrainOptions(), processes, Requests())
        order = run.batches.train.order
        for epoch in range(3):
            for number, (x, y) in enumerate(run.batches.train.epoch(epoch)):
                samples = order.size(number)
                step = captured.train_step(run.network, run.optimizer, x.double(), y, cfg, samples, processes)
                losses.append((processes.total(step.totals)[0] / samples).item())
    return losses[:STEPS]


def run_process(rank, world, port, cfg, out):
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    torch.set_num_threads(1)
    losses = first_losses(cfg)
    if rank == 0:
        out.write_text(json.dumps(losses))


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def losses_with_processes(world: int, cfg, out: Path) -> list[float]:
    mp.spawn(run_process, (world, free_port(), cfg, out), nprocs=world)
    return json.loads(out.read_text())


def test_two_processes_have_the_losses_of_one(tmp_path):
    alone = losses_with_processes(1, UNEVEN, tmp_path / "one.json")
    together = losses_with_processes(2, UNEVEN, tmp_path / "two.json")
    assert len(alone) == STEPS
    assert alone[0] != alone[-1]
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-8)


@pytest.mark.parametrize("world", [1, 2, 3, 7])
def test_every_sample_is_used_once(world):
    seen = []
    for rank in range(world):
        order = Order(101, 8, True, 3, (rank, world))
        seen += [int(i) for index_N, _ in order.epoch(2, 0) for i in index_N]
    assert sorted(seen) == list(range(101))
    assert sum(Order(101, 8, True, 3).size(batch) for batch in range(13)) == 101


def torchrun(*options: str, out: Path, epochs: int = 2, more: Sequence[str] = ()) -> subprocess.Popen:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *options]
    train = ["-m", "multifire", "train", "digits", "--data.limit", "256", "--data.timesteps", "2", "--model.width", "4",
             "--optim.epochs", str(epochs), "--checkpoint-every", "3", "--out", str(out)]  # fmt: skip
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*command, *train, *more], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env
    )


@pytest.mark.slow
def test_a_run_survives_the_death_of_its_workers(tmp_path):
    """A worker is killed three times; the run restarts by itself, ends as an undisturbed one, and logs the restarts."""
    undisturbed = torchrun(out=tmp_path / "undisturbed", epochs=12)
    said, _ = undisturbed.communicate(timeout=400)
    assert undisturbed.returncode == 0, said
    process = torchrun("--max-restarts", "3", out=tmp_path / "run", epochs=12)
    killed, last = 0, tmp_path / "run" / "last.safetensors"
    while killed < 3 and process.poll() is None:
        before = last.stat().st_mtime if last.exists() else 0
        time.sleep(0.5)
        if last.exists() and last.stat().st_mtime > before:  # it is training
            os.kill(workers(process.pid)[killed % 2], signal.SIGKILL)
            killed += 1
            time.sleep(8)
    said, _ = process.communicate(timeout=400)
    assert process.returncode == 0, said
    assert killed == 3
    assert len(re.findall("held-out accuracy", said)) == 1
    assert len(re.findall(r"exitcode: -9", said)) >= 3
    assert len(re.findall("resuming from", said)) == 3
    whole, found = (json.loads((tmp_path / name / "summary.json").read_text()) for name in ("undisturbed", "run"))
    assert found["epochs"] == whole["epochs"] == 12
    assert found["test_accuracy"] == whole["test_accuracy"]
    weights, others = (load_checkpoint(tmp_path / name / "last.safetensors").model for name in ("undisturbed", "run"))
    assert all(torch.equal(weights[name], tensor) for name, tensor in others.items())


@pytest.mark.slow
def test_a_failing_process_stops_the_others_with_its_message(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "something").touch()
    began = time.monotonic()
    process = torchrun(out=tmp_path / "run")
    said, _ = process.communicate(timeout=120)
    assert process.returncode != 0
    assert time.monotonic() - began < 60
    assert "exists; give --resume to continue it" in said


@pytest.mark.slow
def test_several_seeds_train_one_after_another_in_the_same_processes(tmp_path):
    """Each run makes a new process group, which must not read the addresses of the previous one."""
    said, _ = torchrun(out=tmp_path, more=["--seeds", "0,1"]).communicate(timeout=120)
    assert len(re.findall("held-out accuracy", said)) == 2, said
    assert len(re.findall("mean and standard deviation of 2 runs", said)) == 1
    assert len(json.loads((tmp_path / "seeds.json").read_text())["runs"]) == 2


@pytest.mark.slow
def test_processes_that_are_terminated_together_leave_a_checkpoint(tmp_path):
    process = torchrun(out=tmp_path / "run", epochs=50)
    last = tmp_path / "run" / "last.safetensors"
    while not last.exists() and process.poll() is None:
        time.sleep(0.2)
    process.terminate()
    said, _ = process.communicate(timeout=120)
    assert "give --resume to continue" in said
    assert load_checkpoint(last).position.epoch < 50


def workers(agent: int) -> list[int]:
    """Return the process numbers of torchrun's workers."""
    children = Path(f"/proc/{agent}/task/{agent}/children").read_text().split()
    return [int(child) for child in children]
