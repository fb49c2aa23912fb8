"""Runs survive problems of the machine: a full disk, a folder without write permission, too little memory."""

import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import multifire.training.captured as captured
import multifire.training.loop as training
from multifire.analysis.evaluate import evaluate
from multifire.cli import main
from multifire.config import TrainOptions
from multifire.nn import model_from_config
from multifire.training.checkpoint import load_checkpoint, load_newest
from multifire.training.data import load_batches
from multifire.training.loop import train
from multifire.training.run_folder import RunFolder
from multifire.training.signals import Interrupted
from multifire.utils.memory import is_out_of_memory
from tests.test_train import RESUME, TINY, override, without_time
from tools.watch_memory import slope, watch

SMALL = ["digits", "--data.limit", "64", "--data.timesteps", "1", "--optim.batch-size", "16",
         "--eval-batch-size", "500", "--optim.epochs", "2"]  # fmt: skip


@contextlib.contextmanager
def disk(folder: Path, options: str):
    """Mount a separate file system at `folder`; skip the test if that is not allowed."""
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True).returncode:
        pytest.skip("only root can mount a small disk")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(file: Path) -> None:
    """Write to the file until the disk is full."""
    with file.open("wb", 0) as target, contextlib.suppress(OSError):
        while True:
            target.write(bytes(4096))


def test_a_full_disk_stops_a_run_with_one_line_and_the_run_can_be_resumed(tmp_path, capsys):
    """Checkpoints fill the free space of a 20 MB disk; the last intact one loads, and the run is resumed from it."""
    with disk(tmp_path / "disk", "size=20m") as small:
        (small / "others").write_bytes(bytes(20_600_000))
        run = ["train", *SMALL, "--model.width", "4", "--checkpoint-every", "1", "--out", str(small / "run")]
        assert main([*run, "--keep", "50"]) == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1
        assert "last.safetensors: No space left on device; make room, then give --resume to continue the run" in err
        assert not list((small / "run").glob(".*.tmp"))
        assert load_newest(small / "run" / "last.safetensors")
        assert len(list((small / "run").glob("last*"))) > 3
        (small / "others").unlink()
        assert main([*run, "--resume"]) == 0
    assert "held-out accuracy" in capsys.readouterr().out


def test_a_disk_without_a_free_byte_damages_no_checkpoint(tmp_path, monkeypatch, capsys):
    """Another program fills the disk in the second epoch, so that metrics and curves cannot be written either."""
    with disk(tmp_path / "disk", "size=4m") as small:
        step, calls = captured.train_step, iter(range(1000))

        def step_with_full_disk(*args):
            if next(calls) == 6:
                fill(small / "other")
            return step(*args)

        monkeypatch.setattr(captured, "train_step", step_with_full_disk)
        run = ["train", *SMALL, "--model.width", "2", "--out", str(small / "run")]
        assert main(run) == 2
        monkeypatch.undo()
        assert "No space left on device; make room" in capsys.readouterr().err
        assert load_checkpoint(small / "run" / "last.safetensors").position.epoch == 1
        (small / "other").unlink()
        assert main([*run, "--resume"]) == 0
        assert len(RunFolder(small / "run").metrics()) == 2


def test_a_disk_that_is_too_small_is_reported_at_the_start(tmp_path, capsys):
    with disk(tmp_path / "disk", "size=2m") as small:
        assert main(["train", *SMALL, "--model.width", "32", "--out", str(small / "run")]) == 2
        assert "MB free on this disk, a run's checkpoints need" in capsys.readouterr().err


def test_a_read_only_folder_is_reported_at_the_start(tmp_path, capsys):
    with disk(tmp_path / "disk", "size=4m") as small:
        run = ["train", *SMALL, "--model.width", "2"]
        assert main([*run, "--max-time", "0.001s", "--out", str(small / "run")]) == 0
        subprocess.run(["mount", "-o", "remount,ro", str(small)], check=True)
        capsys.readouterr()
        for more in (["--out", str(small / "new")], ["--out", str(small / "run"), "--resume"]):
            assert main([*run, *more]) == 2
            err = capsys.readouterr().err
            assert err.count("\n") == 1
            assert f"multifire: error: {more[1]}" in err
            assert err.endswith(": Read-only file system\n")


def test_a_folder_without_write_permission_is_reported_at_the_start(tmp_path, capsys):
    if os.geteuid() == 0:
        pytest.skip("root can write to every folder")
    tmp_path.chmod(0o500)
    assert main(["train", *SMALL, "--out", str(tmp_path / "run")]) == 2
    assert "Permission denied" in capsys.readouterr().err


@pytest.mark.parametrize("message", ["can't allocate memory: you tried", "could not create a primitive"])
def test_errors_that_report_lack_of_memory(message):
    assert is_out_of_memory(RuntimeError(message))
    assert not is_out_of_memory(RuntimeError("shapes differ"))


def test_an_evaluation_that_needs_too_much_memory_names_the_option_to_lower(monkeypatch):
    """A tensor that is larger than any memory makes torch's allocator raise its real error."""
    batches = load_batches(TINY, torch.device("cpu")).test
    model = model_from_config(TINY.model)
    monkeypatch.setattr(model, "forward", lambda *args, **options: torch.empty(1 << 60))
    with pytest.raises(MemoryError, match="500 samples were evaluated at once; give a smaller --eval-batch-size"):
        evaluate(model, batches)


@pytest.mark.slow
def test_a_memory_limit_is_explained(tmp_path):
    """The system limits the address space of the process, so that the allocator or oneDNN fails in a step."""
    options = ["--optim.batch-size", "2000", "--model.width", "32", "--out", str(tmp_path / "run")]
    done = subprocess.run(
        [sys.executable, "-m", "multifire", "train", "digits", *options],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (2_600_000_000, 2_600_000_000)),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert "out of memory with --optim.batch-size 2000; " in done.stderr
    assert "Traceback" not in done.stderr


def test_a_run_stopped_in_an_evaluation_and_resumed_ends_with_the_same_weights(tmp_path, monkeypatch):
    """The epoch before the evaluation is not trained again, and no figure is lost or counted twice."""
    original, calls = training.evaluate, iter(range(1000))

    def evaluate_with_signal(*args, **options):
        if next(calls) == 1:
            signal.raise_signal(signal.SIGTERM)
        return original(*args, **options)

    train(TINY, tmp_path / "whole")
    monkeypatch.setattr(training, "evaluate", evaluate_with_signal)
    with pytest.raises(Interrupted, match=r"stopped in the evaluation after epoch 2/3; .* give --resume") as stopped:
        train(TINY, tmp_path / "stopped")
    monkeypatch.undo()
    assert stopped.value.exit_code == 143
    position = load_checkpoint(tmp_path / "stopped" / "last.safetensors").position
    assert (position.epoch, position.step) == (1, 4)
    train(TINY, tmp_path / "stopped", RESUME)
    whole, resumed = (load_checkpoint(tmp_path / name / "last.safetensors") for name in ("whole", "stopped"))
    assert all(torch.equal(resumed.model[name], tensor) for name, tensor in whole.model.items())
    expected, records = (without_time(RunFolder(tmp_path / name).metrics()) for name in ("whole", "stopped"))
    assert records == expected


def test_a_run_killed_before_its_first_evaluation_can_be_resumed(tmp_path, monkeypatch):
    def kill(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "evaluate", kill)
    with pytest.raises(KeyboardInterrupt):
        train(TINY, tmp_path / "run")
    monkeypatch.undo()
    assert train(TINY, tmp_path / "run", RESUME)["epochs"] == 3


def test_a_stopped_run_of_several_seeds_can_be_resumed(tmp_path, capsys):
    """The stop is in the run of the first seed, so that the other seeds have no folder yet."""
    run = ["train", *SMALL, "--model.width", "2", "--seeds", "0,1", "--out", str(tmp_path)]
    assert main([*run, "--max-time", "0.001s"]) == 0
    assert "give --resume to continue" in capsys.readouterr().err
    assert not (tmp_path / "seed-1").exists()
    assert main([*run, "--resume"]) == 0
    summary = json.loads((tmp_path / "seeds.json").read_text())
    accuracies = [row["test accuracy %"] for row in summary["runs"]]
    assert summary["test accuracy %"]["mean"] == pytest.approx(sum(accuracies) / 2)
    assert summary["test accuracy %"]["standard deviation"] == pytest.approx(
        abs(accuracies[0] - accuracies[1]) / 2**0.5
    )


def test_a_tracker_that_fails_does_not_end_a_run(tmp_path, monkeypatch, caplog):
    from torch.utils.tensorboard import SummaryWriter

    def fail(*args):
        raise ConnectionError("the server does not answer")

    monkeypatch.setattr(SummaryWriter, "add_scalar", fail)
    with caplog.at_level("WARNING", "multifire"):
        train(replace(override(TINY, optim={"epochs": 1})), tmp_path / "run", TrainOptions(track=("tensorboard",)))
    assert "TensorBoard failed (the server does not answer); metrics.jsonl has the figures" in caplog.text


def test_a_tracker_that_cannot_start_is_reported_before_training(tmp_path, monkeypatch):
    def refuse(*args):
        raise RuntimeError("no such server")

    monkeypatch.setattr("torch.utils.tensorboard.SummaryWriter.__init__", refuse)
    with pytest.raises(OSError, match="tracker tensorboard did not start: no such server; fix that, or leave it out"):
        train(TINY, tmp_path / "run", TrainOptions(track=("tensorboard",)))


@pytest.mark.slow
def test_memory_and_open_files_do_not_grow(tmp_path):
    memory, files = watch(2000, tmp_path / "run")
    assert len(memory) == 2000
    assert slope(memory[200:]) <= 1000
    assert files[200:].min() == files[200:].max()
