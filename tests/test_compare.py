"""Comparing runs, training several seeds, and estimating a run."""

import csv
import json

import pytest

from multifire.cli import main
from multifire.config import TrainOptions
from multifire.config.schema import parse_duration
from multifire.experiments.compare import compare
from multifire.experiments.plan import plan
from multifire.report.values import mean_and_deviation
from multifire.training.loop import train
from tests.test_train import TINY, override

QUICK = [
    "--data.limit",
    "64",
    "--data.timesteps",
    "2",
    "--model.width",
    "2",
    "--optim.epochs",
    "1",
    "--eval-batch-size",
    "500",
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    for levels in (1, 2):
        cfg = override(TINY, model={"levels": levels}, optim={"epochs": 1})
        train(cfg, folder / f"K{levels}")
    return folder


def test_rows_hold_the_fields_that_differ_and_the_results(runs):
    rows = compare([runs / "K1", runs / "K2"])
    assert [row["model.levels"] for row in rows] == [1, 2]
    assert "optim.lr" not in rows[0]
    for row in rows:
        summary = json.loads((runs / f"K{row['model.levels']}" / "summary.json").read_text())
        assert row["test accuracy %"] == round(100 * summary["test_accuracy"], 2)
        assert row["epochs"] == 1


def test_the_command_prints_a_table_and_writes_csv(runs, tmp_path, capsys):
    assert main(["compare", str(runs / "K1"), str(runs / "K2"), "--csv", str(tmp_path / "x.csv")]) == 0
    assert "mean and standard deviation of 2 runs" in capsys.readouterr().out
    with (tmp_path / "x.csv").open() as file:
        assert [row["model.levels"] for row in csv.DictReader(file)] == ["1", "2"]


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"test_accuracy": "x", "test_accuracy_of": 1}', "[" * 100_000, "\xff"]
)
def test_a_damaged_summary_is_an_error(runs, tmp_path, content):
    (tmp_path / "config.json").write_bytes((runs / "K1" / "config.json").read_bytes())
    (tmp_path / "summary.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(ValueError, match=r"summary\.json: not a run's summary"):
        compare([tmp_path])


def test_an_unfinished_run_is_an_error(tmp_path, capsys):
    assert main(["compare", str(tmp_path)]) == 2
    assert "no finished run" in capsys.readouterr().err


def test_mean_and_standard_deviation():
    assert mean_and_deviation([3.0]) == (3.0, 0.0)
    assert mean_and_deviation([1.0, 3.0]) == (2.0, 2**0.5)


def test_every_seed_gets_its_own_run(tmp_path, capsys):
    assert main(["train", "digits", *QUICK, "--seeds", "0,7", "--out", str(tmp_path / "s")]) == 0
    assert "of 2 runs" in capsys.readouterr().out
    assert json.loads((tmp_path / "s" / "seed-7" / "config.json").read_text())["seed"] == 7
    assert (tmp_path / "s" / "seeds.csv").is_file()
    assert main(["train", "digits", *QUICK, "--seeds", "0,0", "--out", str(tmp_path / "t")]) == 2
    assert "expected different numbers such as 0,1,2" in capsys.readouterr().err


def test_a_dry_run_writes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["train", "digits", *QUICK, "--dry-run"]) == 0
    assert "nothing was written" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_plan_predicts_the_size_of_a_checkpoint(tmp_path, optimizer):
    cfg = override(TINY, model={"levels": 1}, optim={"epochs": 1, "optimizer": optimizer})
    estimate = plan(cfg)
    train(cfg, tmp_path / "run")
    written = (tmp_path / "run" / "last.safetensors").stat().st_size
    assert estimate.steps_per_epoch == 4
    assert 0 < written - estimate.checkpoint_bytes < 20_000  # the header of the file


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("keep", 0),
        ("checkpoint_every", "10x"),
        ("checkpoint_every", "0"),
        ("checkpoint_every", "m"),
        ("max_time", "-1s"),
        ("max_time", "5"),
        ("cuda_graphs", "on"),
        ("resume", True),
    ],
)
def test_train_options_out_of_range_are_refused(option, value):
    with pytest.raises(ValueError, match=rf"{option} is .*expected"):
        TrainOptions(**{option: value})


def test_durations_are_parsed():
    assert [parse_duration(text, "x") for text in ("90s", "1.5m", "2h")] == [90, 90, 7200]
