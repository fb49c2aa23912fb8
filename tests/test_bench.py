"""`multifire bench`: what is measured. Tests do not check how fast it is."""

import json
from dataclasses import replace

import pytest
import torch

from multifire.cli import main
from multifire.config import get_recipe
from multifire.experiments.bench import Floor, Network, bench

TINY = replace(
    get_recipe("digits"),
    model=replace(get_recipe("digits").model, width=2),
    optim=replace(get_recipe("digits").optim, batch_size=2),
    device="cpu",
)


def test_the_floor_runs_every_convolution_for_every_time_step():
    network = Network(TINY, torch.device("cpu"))
    floor = Floor(network)
    convolutions = [m for m in network.model.modules() if isinstance(m, torch.nn.Conv2d)]
    assert {id(conv) for conv, *_ in floor.calls} == {id(conv) for conv in convolutions}
    assert len(floor.calls) == len(convolutions)
    assert all(x.shape[0] == TINY.data.timesteps * TINY.optim.batch_size for _, x, _, _ in floor.calls)
    assert [x.requires_grad for _, x, _, _ in floor.calls] == [False] + [True] * (len(convolutions) - 1)


def test_figures_are_complete_and_consistent():
    turns = []
    figures = bench(TINY, 2, lambda: turns.append(1), reference=True)
    assert len(turns) == 2 * (2 + 2)
    assert sum(figures["share_of_a_step"].values()) == pytest.approx(1)
    assert figures["peak_bytes"] > 0
    assert figures["kept_bytes"].keys() == {"convolutions", "neurons and norms", "the rest"}
    assert ("neurons and norms" in figures["share_of_a_step"]) == (figures["backends"] != ["reference"])
    for timing in figures["timings"].values():
        assert timing.keys() == {"network", "convolutions alone", "reference in fp32"}
        assert timing["convolutions alone"]["ratio"] == 1
        for seconds in timing.values():
            assert seconds["runs"] == 2
            assert 0 < seconds["fastest"] <= seconds["median"] <= seconds["slowest"]
            assert seconds["ratio"] > 0


def test_the_command_writes_its_figures(tmp_path, capsys):
    out = tmp_path / "figures.json"
    small = ["--model.width", "2", "--optim.batch-size", "2", "--runs", "1", "--out", str(out)]
    assert main(["bench", "digits", *small]) == 0
    assert "kept for the backward pass" in capsys.readouterr().out
    assert json.loads(out.read_text())["recipe"] == "digits"
