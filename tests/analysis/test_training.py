"""Analyses written during training: their contents, unchanged weights, and one analysis per epoch after resuming."""

import json
from dataclasses import replace
from functools import partial

import pytest
import torch

from multifire.analysis import analyze
from multifire.analysis.evaluate import evaluate
from multifire.config import TrainOptions
from multifire.nn import model_from_config
from multifire.training import records
from multifire.training.checkpoint import load_checkpoint, load_model, load_weights
from multifire.training.data import analysis_samples, load_batches
from multifire.training.loop import train
from multifire.training.run_folder import RunFolder
from multifire.training.signals import Interrupted
from multifire.training.step import sum_of_losses
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


def test_each_epoch_and_the_finished_network_are_analysed(analysed):
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


def test_analyses_do_not_change_the_weights(analysed, tmp_path):
    train(CFG, tmp_path / "not_analysed", TrainOptions(analyze_every=0))
    assert_same_weights(analysed, tmp_path / "not_analysed")
    assert not list((tmp_path / "not_analysed").glob("analysis*"))


def test_analyze_every_2_analyses_every_second_epoch(tmp_path):
    train(CFG, tmp_path / "run", TrainOptions(analyze_every=2))
    assert [record["epoch"] for record in RunFolder(tmp_path / "run").analyses()] == [1]


@pytest.mark.parametrize("stop_at", [4, 6])
def test_resumed_run_has_one_analysis_per_epoch(analysed, tmp_path, monkeypatch, stop_at):
    out = tmp_path / "stopped"
    stop_after(stop_at, monkeypatch)
    with pytest.raises(Interrupted):
        train(CFG, out)
    monkeypatch.undo()
    # A crash after the analysis was written and before the checkpoint was written leaves such a file.
    with (out / "analysis.jsonl").open("a") as file:
        file.write('{"epoch": 1}\n{"epoch": 2, "lay')
    train(CFG, out, TrainOptions(resume="yes"))
    assert_same_weights(analysed, out)
    assert without_seconds(RunFolder(out).analyses()) == without_seconds(RunFolder(analysed).analyses())


def analysis_of(model, cfg):
    """Return the analysis after an epoch as a record of analysis.jsonl, without epoch, split and seconds."""
    batches, loss = load_batches(cfg, torch.device("cpu")), partial(sum_of_losses, optim=cfg.optim)
    scored = evaluate(model, batches.selection, cfg.precision)
    samples = list(batches.selection_analysis.epoch(0))
    found = analyze(model, samples, loss=loss, precision=cfg.precision, scored=scored).record()
    return json.loads(json.dumps({name: value for name, value in found.items() if name != "seconds"}))


def test_analyses_of_a_moving_average_describe_it_and_do_not_change_the_weights(tmp_path):
    """With a moving average of the weights, the analysed weights are not the trained weights."""
    cfg = override(replace(CFG, precision="bf16"), optim={"ema_decay": 0.9})
    for name, every in (("analysed", 1), ("not_analysed", 0)):
        train(cfg, tmp_path / name, TrainOptions(analyze_every=every))
    assert_same_weights(tmp_path / "analysed", tmp_path / "not_analysed")

    checkpoint = load_checkpoint(tmp_path / "analysed" / "last.safetensors")
    averaged, trained = (model_from_config(cfg.model, cfg.backend) for _ in range(2))
    load_weights(averaged, checkpoint.average, source="the moving average")
    load_weights(trained, checkpoint.model, source="the trained weights")
    written = without_seconds(RunFolder(tmp_path / "analysed").analyses())[-1]
    assert (written.pop("epoch"), written.pop("split")) == (1, "validation")
    expected, of_the_trained = analysis_of(averaged, cfg), analysis_of(trained, cfg)
    assert written == expected
    for name in ("layers", "gradient", "per_step", "energy"):
        assert written[name] != of_the_trained[name], name


def test_failed_analysis_does_not_stop_the_run(tmp_path, monkeypatch):
    def fail(*args, **options):
        raise FloatingPointError("a membrane is NaN")

    monkeypatch.setattr(records, "analyze", fail)
    train(CFG, tmp_path / "run")
    assert not list((tmp_path / "run").glob("analysis*"))
    assert (tmp_path / "run" / "summary.json").is_file()


def test_negative_analyze_every_is_refused():
    with pytest.raises(ValueError, match="analyze_every is -1, expected at least 0"):
        TrainOptions(analyze_every=-1)
