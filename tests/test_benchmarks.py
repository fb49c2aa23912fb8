"""The benchmark's tool measures in turns, compares what it should, and writes what it measured."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import tables
from benchmarks.__main__ import PARTS, alternate, describe, everybody, installed, time_them
from benchmarks.cases import CIFAR10, CIFAR10_DVS, GESTURE
from benchmarks.contestants import Contestant, FloorPlayer, Player, make_player
from benchmarks.worker import peak_of_steps, workers
from multifire.nn import model_from_config

# Width 8: with 2 or 4 channels in, torch 2.13 corrupts the heap backward of a channels-last 1×1 conv of stride 2.
TINY = CIFAR10.with_(name="ds_resnet8", width=8, batch_size=2, timesteps=2)
TINY_EVENTS = GESTURE.with_(name="plain_resnet8", width=2, batch_size=2, timesteps=3)
MACHINE = {"processor": "a processor", "threads": 2, "kernel": "avx2", "torch": "9.9", "framework": "1.0"}


class Asked:
    """Answers with the times of a script, and writes down who was asked."""

    def __init__(self, name: str, seconds: list[float], log: list[str]):
        self.name, self.seconds, self.log = name, iter(seconds), log

    def ask(self, what: str) -> tuple[float, float]:
        self.log.append(self.name + what)
        return next(self.seconds), 0.5


def test_runs_alternate_and_the_first_ones_do_not_count(tmp_path):
    log: list[str] = []
    asked = [Asked("a", [9, 8, 1, 2, 3], log), Asked("b", [7, 6, 4, 5, 6], log)]
    seconds, first = alternate(asked, " step", 3, tmp_path / "lock")
    assert log == ["a step", "b step"] * 5
    assert seconds == [[1, 2, 3], [4, 5, 6]]
    assert first == [(9, 0.5), (7, 0.5)]


def test_curves_are_apart_by_backend_and_by_seed(tmp_path):
    losses = {("cpu", 0): 2.5, ("reference", 0): 2.25, ("cpu", 1): 1.0, ("reference", 1): 1.75}
    rows = [
        {
            "backend": backend,
            "seed": seed,
            "epoch": 1,
            "train_loss": loss,
            "validation_accuracy": loss / 10,
            "processor": "a processor",
        }
        for (backend, seed), loss in losses.items()
    ]
    line = "| 1 | 0.5000 | 0.5000 | 5.00 | 5.00 |"
    assert line in tables.curves_apart(rows)
    rows[1]["train_loss"] = 2.75
    tables.write_csv(tmp_path / "curves.csv", list(rows[0]), rows)
    assert "| 1 | 0.5000 | 1.0000 | 5.00 | 5.00 |" in tables.page(tmp_path)


def test_a_ratio_is_of_neighbours():
    # The machine got ten times slower after the first turn: the medians' ratio would say 5, the neighbours' say 2.
    row = tables.summary([2.0, 20.0, 20.0], [1.0, 10.0, 4.0])
    assert row == {"n": 3, "median_s": 20.0, "fastest_s": 2.0, "slowest_s": 20.0, "ratio": 2.0}


def _times(framework: str, seconds: list[float], base: list[float], case=TINY) -> dict:
    contestant = Contestant("multifire" if framework == "multifire" else "floor", case)
    row = describe("cifar10", contestant, MACHINE) | {"framework": framework, "what": "training step"}
    return row | {"first_call_s": 1.0, "loss": 2.3, "peak_bytes": 5_000_000} | tables.summary(seconds, base)


def test_the_page_shows_what_the_files_hold(tmp_path):
    ours, other = [0.2, 0.3, 0.4], [0.6, 0.9, 1.2]
    rows = [_times("multifire", ours, ours), _times("spikingjelly", other, ours)]
    tables.write_csv(tmp_path / "cifar10.csv", tables.TIMES, rows)
    page = tables.page(tmp_path)
    assert "a processor, 2 threads" in page
    assert "[T, N, C, H, W] = [2, 2, 3, 32, 32]" in page
    assert "spikingjelly 1.0" in page
    assert "| training step, spikingjelly | fp32 | 450.0 | 300.0–600.0 | 2.2 | 3.00 | – | – | 5 MB | 3 |" in page
    assert "Levels" not in page  # nothing of it was measured


@pytest.mark.slow
def test_times_are_beside_the_floors_of_the_same_precision(tmp_path, capsys):
    class Args:
        threads, runs, lock = 1, 1, None

    who = [Contestant(name, TINY, precision) for precision in ("fp32", "bf16") for name in ("multifire", "floor")]
    rows = time_them("cifar10", [*who, Contestant("reference", TINY)], Args, ["training step"])
    assert [row["floor_ratio"] for row in rows] == [
        pytest.approx(rows[i]["median_s"] / rows[floor]["median_s"]) for i, floor in enumerate((1, 1, 3, 3, 1))
    ]
    tables.write_csv(tmp_path / "cifar10.csv", tables.TIMES, rows)
    assert f"| {rows[0]['floor_ratio']:.3f} |" in tables.page(tmp_path)


def test_a_sweep_is_per_image_and_time_step(tmp_path):
    first, second = [0.4, 0.4], [1.0, 1.0]
    rows = [_times("multifire", first, first), _times("multifire", second, first, TINY.with_(timesteps=4))]
    tables.write_csv(tmp_path / "timesteps.csv", tables.TIMES, rows)
    assert "| 125,000 | 125,000–125,000 | 1.250 | 2 |" in tables.page(tmp_path)


def test_linearity_in_depth():
    rows = [{"model": f"ds_resnet{d}", "peak_bytes": 1e7 + 1e6 * d, "kept_bytes": 2e6 * d} for d in (20, 32, 44)]
    said = tables.linearity("fp32", rows)
    assert "depths, fp32: peak 10 MB + 1.0 MB per layer, at most 0.0 % off; kept 0 MB + 2.0 MB" in said
    assert tables.linearity("fp32", rows[:2]) == ""


def test_a_field_that_is_no_column_is_refused(tmp_path):
    with pytest.raises(ValueError, match="unheard_of"):
        tables.write_csv(tmp_path / "x.csv", tables.TIMES, [{"unheard_of": 1}])


def test_workers_answer_and_say_what_failed():
    contestants = [Contestant("multifire", TINY), Contestant("floor", TINY)]
    with workers(contestants, threads=1) as started:
        (ours, floor) = (worker.ask("step") for worker in started)
        assert ours[0] > 0
        assert ours[1] == pytest.approx(Player(contestants[0]).step(), rel=1e-4)
        assert floor[0] > 0
        assert started[0].ask("machine")["threads"] == 1
        with pytest.raises(RuntimeError, match=r"AttributeError.*dance"):
            started[0].ask("dance")
        assert started[0].ask("evaluate")[0] > 0


@pytest.mark.parametrize("case", [TINY, TINY_EVENTS], ids=["still", "events"])
def test_spikes_that_bf16_moves(case):
    moved = Player(Contestant("multifire", case, "bf16")).moved()
    assert {"stem", "stages.0.0.fire2"} <= moved.keys()
    for of_layer in moved.values():
        assert of_layer.kernel <= 1e-4
        assert of_layer.layer < 0.02
        assert 0 < of_layer.fire < 0.5
    assert moved["stem"].network == moved["stem"].layer
    assert max(of_layer.layer for of_layer in moved.values()) > 0
    assert max(of_layer.network for of_layer in moved.values()) > 0


def test_moved_spikes_are_weighed_by_neuron_steps(tmp_path):
    row = describe("spikes", Contestant("multifire", TINY, "bf16"), MACHINE)
    values = [(300, 0.25, 0.0, 0.01, 0.02), (100, 0.05, 0.0004, 0.05, 0.3)]
    rows = [row | {"layer": "a"} | dict(zip(tables.MOVED, of_layer, strict=True)) for of_layer in values]
    tables.write_csv(tmp_path / "spikes.csv", tables.SPIKES, rows)
    line = "| 400 | 20.0 % | 0.0100 % | 0.0400 % | 2.0000 % | 5.0000 % | 9.0000 % | 30.0000 % |"
    assert line in tables.page(tmp_path)


@pytest.mark.slow
def test_a_step_has_a_peak():
    assert peak_of_steps(Contestant("reference", TINY.with_(batch_size=64, width=16)), 1) > 10e6


def test_cases_are_the_papers():
    parameters = [sum(p.numel() for p in model_from_config(case.cfg.model).parameters()) for case in _PAPER]
    assert parameters == [4_327_754, 272_395, 696_330]
    assert [case.batch()[0].shape for case in _PAPER] == [case.shape for case in _PAPER]


_PAPER = (CIFAR10, GESTURE, CIFAR10_DVS)


def test_everybody_is_beside_ours(tmp_path):
    class Args:
        out = tmp_path

    names = [contestant.framework for contestant in everybody(CIFAR10, Args)]
    assert names[:2] == ["multifire", "floor"]
    assert names.count("reference") >= 2  # eager and compiled
    assert set(installed()) < set(names)
    assert isinstance(make_player(Contestant("floor", TINY)), FloorPlayer)
    assert list(PARTS) == list(tables.SECTIONS)


@pytest.mark.parametrize("peer", ["spikingjelly", "snntorch"])
@pytest.mark.parametrize("case", [TINY, TINY_EVENTS, TINY.with_(surrogate="atan")], ids=["still", "events", "atan"])
@pytest.mark.parametrize("channels_last", [False, True])
def test_peers_compute_the_same(peer, case, channels_last):
    if not importlib.util.find_spec(peer):
        pytest.skip(f"{peer} is not installed; `make bench` installs it in build/bench-venv")
    if (peer, case.cfg.model.surrogate) == ("snntorch", "atan"):
        pytest.skip("the snnTorch network has the surrogate rect only")
    expected = Player(Contestant("reference", case), torch.float64).compare()
    found = Player(Contestant(peer, case, channels_last=channels_last), torch.float64).compare()
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-8, atol=1e-8 * float(value.abs().max()))


ROOT = Path(__file__).parents[1]
SEEN = """
import torch
from benchmarks.engine import available
print(torch.backends.cpu.get_cpu_capability(), *available())
"""


def test_all_but_avx2_can_be_hidden_from_every_library(tmp_path):
    if "cpuid_fault" not in Path("/proc/cpuinfo").read_text() or "avx2" not in Path("/proc/cpuinfo").read_text():
        pytest.skip("the processor cannot hide its instruction sets")
    library = tmp_path / "avx2_only.so"
    source = ROOT / "benchmarks" / "avx2_only.cpp"
    subprocess.run(["g++", "-O2", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-o", library, source], check=True)
    ended = subprocess.run(
        [sys.executable, "-c", SEEN], cwd=ROOT, env={**os.environ, "LD_PRELOAD": str(library)}, capture_output=True,
        text=True, check=True, timeout=300,
    )  # fmt: skip
    assert ended.stdout.split() == ["AVX2", "avx2"]
