"""Sweeps: their runs, budgets, tables and reports, failures, and how they are continued."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest

from multifire.cli import main
from multifire.cli.overrides import parse_overrides
from multifire.cli.sweep import SweepArguments
from multifire.config import get_recipe
from multifire.experiments import sweep, sweep_budget, sweep_cells, sweep_table
from multifire.utils.files import write_json
from tests.test_compare import QUICK
from tests.test_train import TINY, override


def parse(cfg, args):
    return parse_overrides(cfg, args, "sweep", SweepArguments)[0]


def cells(kind="grid", vary=("model.levels=1,2",), seeds=(0,), cfg=TINY, out=None):
    fields = sweep_cells.variations(kind, cfg, vary)
    return sweep_cells.make_cells(get_recipe("digits"), cfg, fields, seeds, out or sweep.Path("out"), parse)


def test_the_sweeps_of_the_paper():
    found = cells("ablation", (), (0, 1, 2), get_recipe("cifar10-small"))
    assert len(found) == 18
    assert {(cell.cfg.model.name, cell.cfg.model.levels) for cell in found} == {
        (name, levels) for name in ("plain_resnet20", "ds_resnet20") for levels in (1, 2, 3)
    }
    depths = cells("depth", (), (0,), get_recipe("cifar10-small"))
    assert [cell.cfg.model.name for cell in depths][:2] == ["plain_resnet14", "plain_resnet20"]
    assert len(depths) == 10
    assert len({cell.folder for cell in (*found, *depths)}) == 28


def test_a_grid_has_every_combination():
    found = cells(vary=("optim.lr=0.1,0.05", "data.flip=true,false", "model.thresholds=0.5,0.7", "model.levels=1"))
    assert len(found) == 8
    assert {(c.cfg.optim.lr, c.cfg.data.flip, c.cfg.model.thresholds) for c in found} == {
        (lr, flip, (t,)) for lr in (0.1, 0.05) for flip in (True, False) for t in (0.5, 0.7)
    }


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"data": {"flip": False, "limit": None, "bin_factor": 3.04}},
        {"model": {"levels": 2, "thresholds": (0.5, 1.5)}},
        {"optim": {"clip_norm": 1.0}},
    ],
)
def test_the_overrides_of_a_configuration_reproduce_it(changes):
    cfg = replace(override(TINY, **changes), recipe="digits", seed=7, sync_norm=True)
    cell = sweep_cells.Cell({}, cfg, sweep.Path("run"), get_recipe("digits"))
    name, *overrides = sweep_cells.train_args(cell)
    assert parse(get_recipe(name), overrides) == cfg


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("sweep", "gird", "digits"), "unknown sweep 'gird'; did you mean grid?"),
        (("sweep", "grid", "digits"), "nothing to vary: give --vary FIELD=V1,V2"),
        (("sweep", "grid", "digits", "--vary", "levels"), "expected a field and different values"),
        (("sweep", "grid", "digits", "--vary", "model.levels=1,1"), "expected a field and different values"),
        (("sweep", "grid", "digits", "--vary", "model.level=1,2"), "did you mean --model.levels?"),
        (("sweep", "grid", "digits", "--vary", "model.levels=0,1"), "model.levels is 0, expected 1 to 64"),
        (("sweep", "grid", "digits", "--vary", "seed=0,1"), "give --seeds instead"),
        (("sweep", "ablation", "digits", "--seeds", "a"), "expected different numbers such as 0,1,2"),
        (("sweep", "ablation", "digits", "--jobs", "0"), "jobs is 0, expected at least 1"),
        (
            ("sweep", "ablation", "digits", "--budget", "soon"),
            "expected a number of epochs ('5 epochs') or a time (30m)",
        ),
        (("sweep", "ablation", "digits", "--budget", "0 epochs"), "expected a number of epochs"),
        (("sweep", "ablation", "--seeds", "0"), "expected a recipe before --seeds"),
    ],
)
def test_a_mistake_prints_one_line_and_writes_nothing(capsys, tmp_path, monkeypatch, args, message):
    monkeypatch.chdir(tmp_path)
    assert main(args) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1
    assert not list(tmp_path.rglob("*.json"))


def test_a_budget_is_turned_into_epochs():
    two = [
        replace(cell, cfg=override(cell.cfg, optim={"epochs": 30, "step_epochs": 10, "warmup_epochs": 3.0}))
        for cell in cells()
    ]
    times = {1: (2.0, 10.0), 2: (4.0, 20.0)}

    def seconds(cfg):
        return times[cfg.model.levels]

    assert sweep_budget.epochs_for_budget(sweep_budget.parse_budget("5 epochs"), two, seconds)[0] == 5
    assert sweep_budget.epochs_for_budget(sweep_budget.parse_budget("5m"), two, seconds)[0] == 9
    assert sweep_budget.epochs_for_budget(sweep_budget.parse_budget("307s"), two, seconds)[0] == 10
    assert sweep_budget.epochs_for_budget(sweep_budget.parse_budget("4h"), two, seconds)[0] == 30
    with pytest.raises(ValueError, match="0:00:06 to start and 0:00:30 for one epoch each, more than the rest"):
        sweep_budget.epochs_for_budget(sweep_budget.parse_budget("35s"), two, seconds)
    scaled = sweep_budget.scale_epochs(two[0].cfg, 10).optim
    assert (scaled.epochs, scaled.step_epochs, scaled.warmup_epochs) == (10, 3, 1.0)


def test_a_continued_sweep_keeps_its_budget(tmp_path):
    lines = []
    record, two = tmp_path / "sweep.json", sweep_budget.parse_budget("2 epochs")
    first = sweep_budget.apply_budget(cells(), record, two, lambda cfg: (0, 1), lines.append)
    again = sweep_budget.apply_budget(cells(), record, two, lambda cfg: 1 / 0, lines.append)
    assert [cell.cfg.optim.epochs for cell in (*first, *again)] == [2, 2, 2, 2]
    assert "2 epochs per run instead of 3" in lines[0]
    with pytest.raises(ValueError, match="began with a budget of 2 epochs, not 5m"):
        sweep_budget.apply_budget(cells(), record, sweep_budget.parse_budget("5m"), lambda cfg: (0, 1), lines.append)


def test_a_budget_of_time_from_the_command_line(tmp_path, capsys):
    """A budget that is too small is refused; one that is large enough changes nothing, and sweep.json records it."""
    args = ["sweep", "grid", "digits", *QUICK, "--vary", "model.levels=1", "--out", str(tmp_path / "sweep")]
    assert main([*args, "--budget", "1s"]) == 2
    assert "1 runs need about" in capsys.readouterr().err
    assert main([*args, "--budget", "1h"]) == 0
    assert "budget 1h: 1 epochs per run instead of 1, about 0:0" in capsys.readouterr().out
    assert json.loads((tmp_path / "sweep" / "sweep.json").read_text())["epochs"] == 1


def test_tables_have_mean_and_deviation_over_seeds(tmp_path):
    outcomes = []
    for cell in cells(seeds=(0, 1), out=tmp_path):
        cell.folder.mkdir()
        levels = cell.cfg.model.levels
        write_json(cell.folder / "summary.json", {"test_accuracy": 0.1 * levels + 0.02 * cell.cfg.seed})
        if cell.cfg.seed == 0:
            write_json(cell.folder / "analysis.json", {"dormant": 0.5})
        outcomes.append(sweep_cells.Outcome(cell, "failed" if (levels, cell.cfg.seed) == (2, 1) else None))
    names, lines = sweep_table.write_tables(outcomes, tmp_path, with_report=False)
    assert names == ["model.levels", "runs", "test accuracy %", "dormant %"]
    assert lines == [["1", "2", "11.00 ± 1.41", "50.00"], ["2", "1", "20.00", "50.00"]]
    assert "| 1 | 2 | 11.00 ± 1.41 | 50.00 |" in (tmp_path / "table.md").read_text()
    assert r"1 & 2 & 11.00 $\pm$ 1.41 & 50.00 \\" in (tmp_path / "table.tex").read_text()
    with (tmp_path / "table.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert float(rows[0]["test accuracy %"]) == pytest.approx(11.0)
    assert float(rows[0]["test accuracy % std"]) == pytest.approx(2**0.5)


def test_a_sweep_trains_continues_and_reports_failures(tmp_path, capsys):
    """Two runs side by side; then again with one finished run, one that must be continued, and one that must fail."""
    out = tmp_path / "sweep"
    args = ["sweep", "grid", "digits", *QUICK, "--vary", "model.levels=1,2", "--jobs", "2", "--out", str(out)]
    assert main(args) == 0
    assert "runs finished: 2" in capsys.readouterr().out
    folders = [out / f"levels-{k}_seed-0" for k in (1, 2)]
    assert [json.loads((f / "config.json").read_text())["model"]["levels"] for f in folders] == [1, 2]
    for name in (
        "report.html",
        "table.md",
        "table.csv",
        "table.tex",
        "figures/accuracy.svg",
        "logs/levels-1_seed-0.log",
    ):
        assert (out / name).is_file(), name

    kept = (folders[0] / "last.safetensors").stat().st_mtime_ns
    weights = (folders[1] / "last.safetensors").read_bytes()
    (folders[1] / "summary.json").unlink()
    other = out / "levels-3_seed-0"
    other.mkdir()
    (other / "mine.txt").write_text("not a run")
    assert main([arg.replace("=1,2", "=1,2,3") for arg in args]) == 1
    out_text, err = capsys.readouterr()
    assert "3 runs, 1 of them finished" in out_text
    assert "failed: model.levels 3, seed 0: exit code 2" in err
    assert "levels-3_seed-0 exists" in err
    assert (folders[0] / "last.safetensors").stat().st_mtime_ns == kept
    assert (folders[1] / "last.safetensors").read_bytes() == weights
    assert (folders[1] / "summary.json").is_file()


def test_a_sweep_of_a_recipe_file(tmp_path, capsys):
    code = tmp_path / "my_recipe.py"
    code.write_text(
        "import multifire as mf\n"
        'recipe = mf.recipe("digits", **{"model.width": 2, "optim.epochs": 1, "data.limit": 64})\n'
    )
    args = ["sweep", "grid", str(code), "--vary", "optim.lr=0.1,0.05", "--out", str(tmp_path / "sweep")]
    assert main(args) == 0
    assert "runs finished: 2" in capsys.readouterr().out
    config = json.loads((tmp_path / "sweep" / "lr-0.05_seed-0" / "config.json").read_text())
    assert (config["code"], config["model"]["width"], config["optim"]["lr"]) == (str(code), 2, 0.05)


def test_a_run_of_another_configuration_is_refused(tmp_path):
    (cell,) = cells(vary=("model.levels=1",), out=tmp_path)
    cell.folder.mkdir()
    from multifire.config.json_format import to_json

    (cell.folder / "config.json").write_text(to_json(override(cell.cfg, optim={"lr": 0.3})))
    with pytest.raises(ValueError, match=r"another configuration \(optim.lr 0.3 -> 0.05\)"):
        sweep.is_finished(cell)


def test_ctrl_c_stops_the_runs_with_a_checkpoint(tmp_path):
    out = tmp_path / "sweep"
    small = ["--model.width", "2", "--data.limit", "640", "--optim.epochs", "500", "--data.timesteps", "2"]
    args = ["sweep", "grid", "digits", *small, "--vary", "model.levels=1", "--out", str(out)]
    process = subprocess.Popen(
        [sys.executable, "-m", "multifire", *args],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    run = out / "levels-1_seed-0"
    deadline = time.monotonic() + 90
    while not (run / "last.safetensors").exists() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=90)
    assert process.returncode == 130, err
    assert "stopped; the same command continues it" in err
    assert "Traceback" not in err
    assert "give --resume to continue" in (out / "logs" / "levels-1_seed-0.log").read_text()
    with pytest.raises(ProcessLookupError):  # no process is left
        os.killpg(child_group(out), 0)


def child_group(out) -> int:
    """Return the group of a process whose command line names `out`, or a number that no process can have."""
    for path in sweep.Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if str(out).encode() in path.read_bytes():
                return os.getpgid(int(path.parent.name))
        except OSError:
            continue
    return 2**22 + 1
