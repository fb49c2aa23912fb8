"""Trackers receive the figures of every epoch, also those of a resumed run."""

import pytest

from multifire.config import TrainOptions
from multifire.training.loop import train
from multifire.training.run_folder import RunFolder
from tests.test_train import TINY, override


def test_mlflow_receives_the_figures_of_every_epoch(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow", reason="the extra `mlflow` is not installed")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file:{tmp_path / 'store'}")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # else newer versions demand a database
    mlflow.set_tracking_uri(f"file:{tmp_path / 'store'}")
    cfg, out = override(TINY, optim={"epochs": 2}), tmp_path / "run"
    train(cfg, out, TrainOptions(track=("mlflow",)))
    client = mlflow.MlflowClient()
    run = client.get_run((out / "mlflow-run.txt").read_text().strip())
    assert run.data.params["optim.lr"] == str(cfg.optim.lr)
    history = client.get_metric_history(run.info.run_id, "train_loss")
    assert [(m.step, m.value) for m in history] == [(r["epoch"], r["train_loss"]) for r in RunFolder(out).metrics()]
    train(cfg, out, TrainOptions(track=("mlflow",), resume="yes"))
    assert len(client.search_runs(["0"])) == 1


def test_without_trackers_there_are_no_event_files(tmp_path):
    train(override(TINY, optim={"epochs": 1}), tmp_path / "run", TrainOptions(track=()))
    assert not list((tmp_path / "run").glob("events.out*"))


def test_a_missing_tracker_is_reported_before_anything_is_written(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"unknown tracker 'tensorbord'.*tensorboard"):
        train(TINY, tmp_path / "run", TrainOptions(track=("tensorbord",)))
    monkeypatch.setattr("multifire.training.trackers.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs the package wandb: pip install 'multifire\[wandb\]'"):
        train(TINY, tmp_path / "run", TrainOptions(track=("wandb",)))
    assert not (tmp_path / "run").exists()
