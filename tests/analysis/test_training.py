"""Analyses that training writes: what they hold, that they change nothing, and that a resumed run has each once."""

import json
from dataclasses import replace

import pytest
import torch

from multifire.analysis.evaluate import evaluate
from multifire.config import TrainOptions
from multifire.training import records
from multifire.training.checkpoint import load_checkpoint, load_model
from multifire.training.data import analysis_samples, load_batches
from multifire.training.loop import train
from multifire.training.run_folder import RunFolder
from multifire.training.signals import Interrupted
from tests.test_train import TINY, override, stop_after

CFG = override(TINY, optim={"epochs": 2}, data={"validation": 0.01})


@pytest.fixture(scope="module")
def analysed(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "analysed"
    train(CFG, out)
    return out


def weights_of(out):
    checkpoint = load_checkpoint(out / "last.safetensors")
    return {**checkpoint.model, **{f"momentum of {name}": tensor for name, tensor in checkpoint.optimizer.items()}}


def assert_same_weights(a, b):
    assert all(torch.equal(tensor, weights_of(b)[name]) for name, tensor in weights_of(a).items())


def without_seconds(records):
    return [{name: value for name, value in record.items() if name != "seconds"} for record in records]


def test_a_line_for_each_epoch_and_the_finished_network(analysed):
    records, metrics = RunFolder(analysed).analyses(), RunFolder(analysed).metrics()
    assert [record["epoch"] for record in records] == [0, 1]
    for record, figures in zip(records, metrics, strict=True):
        assert record["split"] == "validation"
        assert record["samples"] == analysis_samples(128) == 4
        assert record["per_step"]["accuracy"] == figures["validation_accuracy_per_step"]
        assert record["per_step"]["loss"][-1] == figures["validation_loss"]
    assert records[0]["layers"] != records[1]["layers"]
    final = json.loads((analysed / "analysis.json").read_text())
    assert (final["split"], final["checkpoint"]) == ("test", "best by validation")
    model, cfg = load_model(analysed / "best.safetensors")
    scored = evaluate(model, load_batches(cfg, torch.device("cpu")).test)
    assert final["confusion"] == scored.confusion
    assert final["per_step"]["accuracy"][-1] == scored.accuracy
    assert sum(map(sum, final["confusion"])) == final["per_step"]["samples"] == 1000


def test_analysing_changes_no_weight(analysed, tmp_path):
    train(CFG, tmp_path / "blind", TrainOptions(analyze_every=0))
    assert_same_weights(analysed, tmp_path / "blind")
    assert not list((tmp_path / "blind").glob("analysis*"))


def test_every_second_epoch(tmp_path):
    train(CFG, tmp_path / "run", TrainOptions(analyze_every=2))
    assert [record["epoch"] for record in RunFolder(tmp_path / "run").analyses()] == [1]


@pytest.mark.parametrize("stop_at", [4, 6])
def test_resumed_it_has_each_epoch_once(analysed, tmp_path, monkeypatch, stop_at):
    out = tmp_path / "stopped"
    stop_after(stop_at, monkeypatch)
    with pytest.raises(Interrupted):
        train(CFG, out)
    monkeypatch.undo()
    # As a crash between the record and the checkpoint leaves it.
    with (out / "analysis.jsonl").open("a") as file:
        file.write('{"epoch": 1}\n{"epoch": 2, "lay')
    train(CFG, out, TrainOptions(resume="yes"))
    assert_same_weights(analysed, out)
    assert without_seconds(RunFolder(out).analyses()) == without_seconds(RunFolder(analysed).analyses())


def test_a_moving_average_is_what_is_looked_at(tmp_path):
    """And the weights that are trained stay what they are."""
    cfg = override(replace(CFG, precision="bf16"), optim={"ema_decay": 0.9})
    for name, every in (("seen", 1), ("blind", 0)):
        train(cfg, tmp_path / name, TrainOptions(analyze_every=every))
    assert_same_weights(tmp_path / "seen", tmp_path / "blind")


def test_what_cannot_be_analysed_does_not_stop_a_run(tmp_path, monkeypatch):
    def fail(*args, **options):
        raise FloatingPointError("a membrane is NaN")

    monkeypatch.setattr(records, "analyze", fail)
    train(CFG, tmp_path / "run")
    assert not list((tmp_path / "run").glob("analysis*"))
    assert (tmp_path / "run" / "summary.json").is_file()


def test_options_that_make_no_sense():
    with pytest.raises(ValueError, match="analyze_every is -1, expected at least 0"):
        TrainOptions(analyze_every=-1)
