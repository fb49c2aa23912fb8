"""A run outlives what its machine does to it: a full disk, a folder that cannot be written, too little memory."""

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
    """A file system of its own at `folder`; skips where none may be mounted."""
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True).returncode:
        pytest.skip("only root may mount a small disk")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(file: Path) -> None:
    """Write until there is no room."""
    with file.open("wb", 0) as target, contextlib.suppress(OSError):
        while True:
            target.write(bytes(4096))


def test_a_full_disk_stops_a_run_with_a_line_and_it_goes_on_once_there_is_room(tmp_path, capsys):
    """Checkpoints fill what is free of 20 MB; the last whole one loads, and the run ends from there."""
    with disk(tmp_path / "disk", "size=20m") as small:
        (small / "others").write_bytes(bytes(20_600_000))
        run = ["train", *SMALL, "--model.width", "4", "--checkpoint-every", "1", "--out", str(small / "run")]
        assert main([*run, "--keep", "50"]) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1
        assert "last.safetensors: No space left on device; make room, and --resume goes on" in said
        assert not list((small / "run").glob(".*.tmp"))
        found = load_newest(small / "run" / "last.safetensors")
        assert found
        assert len(list((small / "run").glob("last*"))) > 3
        (small / "others").unlink()
        assert main([*run, "--resume"]) == 0
    assert "held-out accuracy" in capsys.readouterr().out


def test_a_disk_without_a_byte_left_costs_no_checkpoint(tmp_path, monkeypatch, capsys):
    """Another program takes all of it in the second epoch: metrics and curves find no room either."""
    with disk(tmp_path / "disk", "size=4m") as small:
        step, calls = training.train_step, iter(range(1000))

        def crowded(*args):
            if next(calls) == 6:
                fill(small / "other")
            return step(*args)

        monkeypatch.setattr(training, "train_step", crowded)
        run = ["train", *SMALL, "--model.width", "2", "--out", str(small / "run")]
        assert main(run) == 2
        monkeypatch.undo()
        assert "No space left on device; make room" in capsys.readouterr().err
        assert load_checkpoint(small / "run" / "last.safetensors").position.epoch == 1
        (small / "other").unlink()
        assert main([*run, "--resume"]) == 0
        assert len(RunFolder(small / "run").metrics()) == 2


def test_a_disk_that_is_too_small_is_told_at_the_start(tmp_path, capsys):
    with disk(tmp_path / "disk", "size=2m") as small:
        assert main(["train", *SMALL, "--model.width", "32", "--out", str(small / "run")]) == 2
        assert "MB free on this disk, a run's checkpoints need" in capsys.readouterr().err


def test_a_read_only_folder_is_told_at_the_start(tmp_path, capsys):
    with disk(tmp_path / "disk", "size=4m") as small:
        run = ["train", *SMALL, "--model.width", "2"]
        assert main([*run, "--max-time", "0.001s", "--out", str(small / "run")]) == 0
        subprocess.run(["mount", "-o", "remount,ro", str(small)], check=True)
        capsys.readouterr()
        for more in (["--out", str(small / "new")], ["--out", str(small / "run"), "--resume"]):
            assert main([*run, *more]) == 2
            said = capsys.readouterr().err
            assert said.count("\n") == 1
            assert f"multifire: error: {more[1]}" in said
            assert said.endswith(": Read-only file system\n")


def test_a_folder_without_permission_is_told_at_the_start(tmp_path, capsys):
    if os.geteuid() == 0:
        pytest.skip("root may write anywhere")
    tmp_path.chmod(0o500)
    assert main(["train", *SMALL, "--out", str(tmp_path / "run")]) == 2
    assert "Permission denied" in capsys.readouterr().err


@pytest.mark.parametrize("message", ["can't allocate memory: you tried", "could not create a primitive"])
def test_errors_that_mean_memory(message):
    assert is_out_of_memory(RuntimeError(message))
    assert not is_out_of_memory(RuntimeError("shapes differ"))


def test_an_evaluation_that_does_not_fit_says_what_to_give_less_of(monkeypatch):
    """The allocator's own error, which torch raises for a tensor that no machine holds."""
    batches = load_batches(TINY, torch.device("cpu")).test
    model = model_from_config(TINY.model)
    monkeypatch.setattr(model, "forward", lambda *args, **options: torch.empty(1 << 60))
    with pytest.raises(MemoryError, match="500 samples were evaluated at once; give a smaller --eval-batch-size"):
        evaluate(model, batches)


@pytest.mark.slow
def test_a_limit_of_memory_is_explained(tmp_path):
    """The address space of a process is limited for real, so that the allocator or oneDNN fails in a step."""
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


def test_stopped_in_an_evaluation_it_ends_with_the_same_weights(tmp_path, monkeypatch):
    """The epoch that was just trained is not trained again, and nothing is lost or counted twice."""
    scoring, calls = training.evaluate, iter(range(1000))

    def pressed(*args, **options):
        if next(calls) == 1:
            signal.raise_signal(signal.SIGTERM)
        return scoring(*args, **options)

    train(TINY, tmp_path / "whole")
    monkeypatch.setattr(training, "evaluate", pressed)
    with pytest.raises(Interrupted, match=r"stopped in the evaluation after epoch 2/3; .* give --resume") as stopped:
        train(TINY, tmp_path / "stopped")
    monkeypatch.undo()
    assert stopped.value.exit_code == 143
    at = load_checkpoint(tmp_path / "stopped" / "last.safetensors").position
    assert (at.epoch, at.step) == (1, 4)
    train(TINY, tmp_path / "stopped", RESUME)
    whole, resumed = (load_checkpoint(tmp_path / name / "last.safetensors") for name in ("whole", "stopped"))
    assert all(torch.equal(resumed.model[name], tensor) for name, tensor in whole.model.items())
    records, again = (without_time(RunFolder(tmp_path / name).metrics()) for name in ("whole", "stopped"))
    assert again == records


def test_killed_before_its_first_evaluation_a_run_goes_on(tmp_path, monkeypatch):
    def killed(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "evaluate", killed)
    with pytest.raises(KeyboardInterrupt):
        train(TINY, tmp_path / "run")
    monkeypatch.undo()
    assert train(TINY, tmp_path / "run", RESUME)["epochs"] == 3


def test_seeds_go_on_where_they_stopped(tmp_path, capsys):
    """Stopped in the first seed's run, the others have no folder yet."""
    run = ["train", *SMALL, "--model.width", "2", "--seeds", "0,1", "--out", str(tmp_path)]
    assert main([*run, "--max-time", "0.001s"]) == 0
    assert "give --resume to go on" in capsys.readouterr().err
    assert not (tmp_path / "seed-1").exists()
    assert main([*run, "--resume"]) == 0
    found = json.loads((tmp_path / "seeds.json").read_text())
    accuracies = [row["test accuracy %"] for row in found["runs"]]
    assert found["test accuracy %"]["mean"] == pytest.approx(sum(accuracies) / 2)
    assert found["test accuracy %"]["standard deviation"] == pytest.approx(abs(accuracies[0] - accuracies[1]) / 2**0.5)


def test_a_tracker_that_fails_does_not_end_a_run(tmp_path, monkeypatch, caplog):
    from torch.utils.tensorboard import SummaryWriter

    def away(*args):
        raise ConnectionError("the server is away")

    monkeypatch.setattr(SummaryWriter, "add_scalar", away)
    with caplog.at_level("WARNING", "multifire"):
        train(replace(override(TINY, optim={"epochs": 1})), tmp_path / "run", TrainOptions(track=("tensorboard",)))
    assert "TensorBoard failed (the server is away); metrics.jsonl has the figures" in caplog.text


def test_a_tracker_that_cannot_start_is_told_before_training(tmp_path, monkeypatch):
    def refuse(*args):
        raise RuntimeError("no such server")

    monkeypatch.setattr("torch.utils.tensorboard.SummaryWriter.__init__", refuse)
    with pytest.raises(OSError, match="tracker tensorboard did not start: no such server; mend that, or leave it out"):
        train(TINY, tmp_path / "run", TrainOptions(track=("tensorboard",)))


@pytest.mark.slow
def test_memory_and_open_files_stay_as_they_are(tmp_path):
    memory, files = watch(2000, tmp_path / "run")
    assert len(memory) == 2000
    assert slope(memory[200:]) <= 1000
    assert files[200:].min() == files[200:].max()
