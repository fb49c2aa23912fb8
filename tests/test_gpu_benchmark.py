"""The benchmark for a GPU runs from end to end on a CPU, keeps what it has measured, and ends in time."""

import csv
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks.gpu_parts.page import NOTHING, page
from benchmarks.gpu_parts.runner import PARTS, Clock
from benchmarks.gpu_parts.setting import MACHINE, Item, Setting, Table, describe, machine
from benchmarks.tables import read_csv
from multifire.experiments.bench import Network
from multifire.nn.conv import SpikeConv2d

ROOT = Path(__file__).parents[1]
PROGRAM = ROOT / "benchmarks" / "gpu.py"
CPU = torch.device("cpu")


def test_every_part_runs_on_a_cpu(tmp_path):
    start = time.monotonic()
    no_wheels = tmp_path / "wheels"  # tracing the networks of other frameworks would take most of the minute
    options = ["--device", "cpu", "--tune", "--out", tmp_path, "--wheels", no_wheels]
    command = [sys.executable, PROGRAM, "--minutes", "1", *options]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - start < 65
    for part in PARTS:
        rows = read_csv(tmp_path / f"gpu-{part}.csv")
        measured = [row for row in rows if not row["error"]]
        assert measured or "skipped" in done.stdout, f"{part}: {done.stdout}"
        assert all(row["error"].startswith("missing: ") for row in rows if row["error"]), rows
        assert all(row["torch"] == torch.__version__ for row in rows)
    checks = read_csv(tmp_path / "gpu-check.csv")
    assert {row["outcome"] for row in checks if row["kind"] == "op"} == {"passed"}
    assert [float(row["value"]) for row in checks if row["kind"] == "difference"] == [0, 0]
    text = page(tmp_path)
    assert "## Steps and evaluations" in text
    assert NOTHING not in text


def test_what_is_measured_at_the_deadline_is_kept(tmp_path):
    program = f"""
import sys, time; sys.path.insert(0, {str(ROOT)!r})
import torch
from pathlib import Path
from benchmarks.gpu_parts import runner
from benchmarks.gpu_parts.setting import Item, Part, Setting
def endless():
    yield {{"value": 1.5}}
    time.sleep(600)
items = [Item("too long", 900, endless), Item("fails", 0.1, lambda: 1 / 0), Item("endless", 0.1, endless)]
runner.PARTS = {{"one": Part(["value"], lambda setting: items)}}
runner.run(["one"], Setting(torch.device("cpu")), Path({str(tmp_path)!r}), time.monotonic() + 2)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    rows = read_csv(tmp_path / "gpu-one.csv")
    assert [(row["value"], row["error"]) for row in rows] == [
        ("", "fails: ZeroDivisionError: division by zero"),
        ("1.5", ""),
    ]
    assert "one: too long: skipped, takes about 900 s" in done.stdout
    assert "stopped: the time is over; in progress was one: endless" in done.stdout


def test_estimates_follow_what_items_of_the_same_kind_took():
    clock = Clock(time.monotonic() + 100)
    short, long = Item("short", 2, list), Item("long", 50, list)
    assert clock.estimate("a", short) == 2
    clock.learn("a", short, 1)
    assert clock.estimate("a", short) == 1
    assert clock.estimate("a", long) == 50
    clock.learn("a", short, 6)
    assert clock.estimate("a", short) == 6
    assert clock.estimate("a", long) == 150
    assert clock.estimate("b", short) == 2
    assert 99 < clock.left < 100


def test_rows_are_added_to_a_file_that_is_continued(tmp_path):
    constant = dict.fromkeys(MACHINE, "x")
    Table(tmp_path / "t.csv", ["a"], constant).add({"a": 1 / 3})
    table = Table(tmp_path / "t.csv", ["a"], constant, append=True)
    table.add({"error": "none, or few"})
    with pytest.raises(ValueError, match="unheard_of"):
        table.add({"unheard_of": 1})
    with (tmp_path / "t.csv").open(newline="") as file:
        assert list(csv.reader(file)) == [
            ["a", "error", *MACHINE],
            ["0.333333", "", *["x"] * len(MACHINE)],
            ["", "none, or few", *["x"] * len(MACHINE)],
        ]


def test_the_page_is_that_of_the_stored_figures():
    assert (ROOT / "docs" / "gpu.md").read_text() == page(ROOT / "benchmarks" / "results")


def test_the_page_says_where_nothing_is_measured(tmp_path):
    text = page(tmp_path)
    assert NOTHING in text
    assert "| network, eager, as `multifire train` ran it | 40.0 |" in text


def test_cases_on_a_gpu_are_the_recipes():
    setting = Setting(torch.device("cuda"))
    case = setting.case("cifar10", 128)
    assert case.shape == (4, 128, 3, 32, 32)
    assert describe(case)["recipe"] == "cifar10"
    assert setting.case("dvs-gesture").shape == (40, 28, 2, 32, 32)
    assert setting.case("cifar10-dvs").shape == (10, 32, 2, 42, 42)
    assert machine(CPU)["card"]


def test_bytes_that_the_kernels_must_move():
    from benchmarks.gpu_parts.kernels import bytes_to_move
    from benchmarks.gpu_parts.steps import PASSES, neuron_steps

    setting = Setting(CPU)
    case = setting.case("dvs-gesture", precision="fp32")  # no static input, so that every layer has as many currents
    network = Network(case.cfg, CPU, setting.batch(case))
    values, moved = 4 * neuron_steps(network), bytes_to_move(network)
    # Three of the nine layers add a block's input to their spikes.
    added = moved["forward"] - 2 * values
    assert 0 < added < values
    assert [moved[name] / values for name in ("measure", "backward", "finish")] == [1, 3, 3]
    assert (
        sum(moved[name] for name in ("measure", "forward", "backward", "finish"))
        == PASSES["training step"] * values + added
    )
    convolutions = [m for m in network.model.modules() if isinstance(m, SpikeConv2d)]
    assert sum(conv.max_input is not None for conv in convolutions) == len(convolutions) - 1
    assert moved["pack"] == moved["unpack"] > 0
