"""Check that users can replace the network, the loss, the optimiser and the recipe, and are told what does not fit."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import multifire as mf
from multifire.config import TrainOptions, architecture
from multifire.config.architecture import NETWORKS
from multifire.nn import resnet
from multifire.training.checkpoint import load_checkpoint, load_model
from multifire.training.loop import train
from multifire.training.optim import make_optimizer
from multifire.training.own import Own
from multifire.training.signals import Interrupted
from multifire.training.step import sum_of_losses
from tests.test_cli import run as run_command
from tests.test_train import TINY, override, stop_after

RESUME = TrainOptions(resume="yes")


class Small(nn.Module):
    """A layer of neurons and a readout at every time step."""

    def __init__(self, classes: int = 10, per_step: bool = True):
        super().__init__()
        self.layer = mf.nn.ConvFire(1, 4, 3, 2, mf.nn.MLF())
        self.readout = nn.Linear(4, classes)
        self.per_step = per_step

    def forward(self, x_TNCHW: Tensor) -> Tensor:
        logits = self.readout(self.layer(x_TNCHW).mean((3, 4)))
        return logits if self.per_step else logits.mean(0)


@pytest.fixture
def registered():
    """Forget the networks that a test registers."""
    before = dict(NETWORKS)
    yield
    NETWORKS.clear()
    NETWORKS.update(before)


@pytest.fixture
def my_net(registered):
    @mf.register_network("my-net")
    def build(model):
        return Small(model.num_classes)

    return override(TINY, model={"name": "my-net"})


def test_a_registered_network_trains_resumes_and_is_scored(my_net, tmp_path, monkeypatch):
    whole = train(my_net, tmp_path / "whole")
    stop_after(6, monkeypatch)
    with pytest.raises(Interrupted):
        train(my_net, tmp_path / "stopped")
    monkeypatch.undo()
    resumed = train(my_net, tmp_path / "stopped", RESUME)
    assert resumed["test_accuracy"] == whole["test_accuracy"]
    first, second = (load_checkpoint(tmp_path / name / "last.safetensors").model for name in ("whole", "stopped"))
    assert all(torch.equal(first[name], tensor) for name, tensor in second.items())
    model, _ = load_model(tmp_path / "whole" / "last.safetensors")
    assert model(torch.zeros(2, 3, 1, 28, 28)).shape == (3, 10)
    assert mf.Run(tmp_path / "whole").accuracy == whole["test_accuracy"]


@pytest.mark.parametrize("name", ["my-net", "ds_resnet8", "plain_resnet20"])
def test_a_network_with_an_existing_name_is_refused(my_net, name):
    with pytest.raises(ValueError, match=f"the network '{name}' exists already"):
        mf.register_network(name)(lambda model: Small())


@pytest.mark.parametrize(
    ("network", "found"), [(Small(7), r"\(2, 32, 7\)"), (Small(10, per_step=False), r"\(32, 10\)")]
)
def test_a_network_with_other_logits_is_refused(network, found, tmp_path):
    with pytest.raises(ValueError, match=rf"returned {found} .*, expected logits of each time step .* = \(2, 32, 10\)"):
        mf.train(TINY, tmp_path / "run", network=network)


def test_a_network_given_as_an_object_trains_and_its_weights_are_loaded_again(tmp_path):
    run = mf.train(TINY, tmp_path / "run", network=(network := Small()))
    again = Small()
    mf.load_weights(again, tmp_path / "run")
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in network.state_dict().items())
    assert run.accuracy == run.summary["test_accuracy"]
    with pytest.raises(
        ValueError, match=r"'Small' was given to mf.train as an object.*; in Python, build it again and call mf.load_w"
    ):
        load_model(tmp_path / "run" / "last.safetensors")


def test_data_given_as_an_object_are_named_so_and_the_report_does_not_advise_what_cannot_be_done(tmp_path):
    rng = np.random.default_rng(0)
    parts = [(rng.integers(0, 256, (40, 12, 12), np.uint8), np.arange(40) % 3) for _ in range(2)]
    data = mf.datasets.make_dataset("mine", *parts)
    run = mf.train(TINY, tmp_path / "run", network=Small(3), data=data)
    assert run.config.data.name == "given:mine"
    assert mf.train(TINY, tmp_path / "run", network=Small(3), data=data, resume="yes").accuracy == run.accuracy
    with pytest.raises(ValueError, match="the data set 'mine' was given to mf"):
        mf.datasets.load(run.config.data.name)
    (note,) = run.notes
    assert note == "The layers of given:Small are not analysed: it is not one of multifire's networks."


def test_an_own_loss_equal_to_the_built_in_one_computes_the_same(tmp_path):
    def mean_cross_entropy(logits_TNL: Tensor, y: Tensor) -> Tensor:
        return sum_of_losses(logits_TNL, y, TINY.optim) / len(y)

    usual = train(TINY, tmp_path / "usual")
    own = train(TINY, tmp_path / "own", own=Own(loss=mean_cross_entropy))
    assert own["test_loss"] == pytest.approx(usual["test_loss"], rel=1e-3)


def test_a_loss_for_each_sample_is_refused(tmp_path):
    def losses(logits_TNL: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(logits_TNL.mean(0), y, reduction="none")

    with pytest.raises(ValueError, match=r"the loss has shape \(32,\), expected a number: the mean loss"):
        mf.train(TINY, tmp_path / "run", loss=losses)


@pytest.mark.parametrize("kind", ["adamw", "nadam of the user"])
def test_other_optimisers_resume_to_the_same_bits(kind, tmp_path, monkeypatch):
    cfg = override(TINY, optim={"optimizer": "adamw", "lr": 3e-3}) if kind == "adamw" else TINY
    own = Own() if kind == "adamw" else Own(optimizer=lambda parameters: torch.optim.NAdam(parameters, 2e-3))
    train(cfg, tmp_path / "whole", own=own)
    stop_after(6, monkeypatch)
    with pytest.raises(Interrupted):
        train(cfg, tmp_path / "stopped", own=own)
    monkeypatch.undo()
    train(cfg, tmp_path / "stopped", RESUME, own)
    whole, stopped = (load_checkpoint(tmp_path / name / "last.safetensors") for name in ("whole", "stopped"))
    assert all(torch.equal(whole.model[name], tensor) for name, tensor in stopped.model.items())
    assert whole.optimizer.keys() == stopped.optimizer.keys()
    assert any(name.endswith(":exp_avg") for name in whole.optimizer)


def test_adamw_decays_weights_apart_from_the_gradient():
    layer = nn.Linear(3, 2, bias=False)
    before = layer.weight.detach().clone()
    optimizer = make_optimizer(layer, replace(TINY.optim, optimizer="adamw", lr=0.1, weight_decay=0.5))
    layer.weight.grad = torch.zeros_like(layer.weight)
    optimizer.step()
    torch.testing.assert_close(layer.weight.detach(), before * (1 - 0.1 * 0.5))


@pytest.mark.parametrize("decay_norms", [True, False])
def test_learned_thresholds_and_decays_do_not_decay(decay_norms):
    model = mf.build_model("ds_resnet8", in_channels=1, width=2, learn_thresholds=True, learn_decay=True)
    optimizer = make_optimizer(model, replace(TINY.optim, weight_decay=0.5, decay_norms=decay_norms))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert not any("raw_" in name for name in changed)
    assert "stem.conv.weight" in changed
    assert ("stem.norm.weight" in changed) == decay_norms


def test_the_learning_rate_of_an_own_optimiser_is_the_highest_of_the_schedule(tmp_path):
    rates: list[float] = []

    class Recorded(torch.optim.SGD):
        def step(self, closure=None):
            rates.append(self.param_groups[0]["lr"])
            return super().step(closure)

    cfg = override(TINY, optim={"schedule": "one-cycle", "lr": 0.3})
    train(cfg, tmp_path / "run", own=Own(optimizer=lambda parameters: Recorded(parameters, lr=0.02)))
    assert max(rates) == pytest.approx(0.02, rel=0.05)
    assert rates[0] == pytest.approx(0.02 / 25, rel=0.2)


def test_frozen_parameters_do_not_change(tmp_path):
    network = Small()
    network.layer.conv.weight.requires_grad_(False)
    before = network.layer.conv.weight.clone()
    mf.train(TINY, tmp_path / "run", network=network)
    assert torch.equal(network.layer.conv.weight, before)


def test_the_function_after_each_epoch_gets_its_record(tmp_path):
    records = []
    run = mf.train(TINY, tmp_path / "run", on_epoch=records.append)
    assert [record["epoch"] for record in records] == list(range(TINY.optim.epochs))
    assert [record["train_loss"] for record in records] == [record["train_loss"] for record in run.metrics]


def test_recipe_applies_overrides_by_name():
    cfg = mf.recipe("digits", **{"optim.epochs": 3, "model.thresholds": (0.5, 1.5), "model.levels": 2, "seed": 7})
    assert (cfg.optim.epochs, cfg.model.thresholds, cfg.seed) == (3, (0.5, 1.5), 7)
    with pytest.raises(ValueError, match=r"unknown override 'optim.epoch'; did you mean optim.epochs\?"):
        mf.recipe("digits", **{"optim.epoch": 3})
    with pytest.raises(ValueError, match=r"optim.epochs is 'many', expected int"):
        mf.recipe("digits", **{"optim.epochs": "many"})


CODE = """
import torch
from torch import nn
import multifire as mf

class Small(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.layer = mf.nn.ConvFire(1, 4, 3, 2, mf.nn.MLF())
        self.readout = nn.Linear(4, classes)

    def forward(self, x):
        return self.readout(self.layer(x).mean((3, 4)))

@mf.register_network("from-file")
def build(model):
    return Small(model.num_classes)

recipe = mf.recipe("digits", **{"model.name": "from-file", "optim.epochs": 1, "data.limit": 60})
"""


@pytest.fixture
def code(tmp_path) -> Path:
    path = tmp_path / "my_recipe.py"
    path.write_text(CODE)
    return path


def test_a_recipe_file_trains_and_its_run_needs_the_code(code, tmp_path):
    out = tmp_path / "run"
    done = run_command("train", str(code), "--out", str(out), "--optim.lr", "0.05")
    assert done.returncode == 0, done.stderr
    config = json.loads((out / "config.json").read_text())
    assert config["recipe"] == "my_recipe"
    assert config["code"] == str(code)
    assert len(config["code_sha256"]) == 64
    assert config["optim"]["lr"] == 0.05
    scored = run_command("eval", str(out), "--code", str(code))
    assert scored.returncode == 0, scored.stderr
    without = run_command("eval", str(out))
    assert without.returncode == 2
    assert "unknown model 'from-file'" in without.stderr
    assert "--code" in without.stderr
    code.write_text(CODE + "\n# changed\n")
    changed = run_command("eval", str(out), "--code", str(code)).stdout
    assert "has changed since it trained" in " ".join(changed.split())
    reported = run_command("report", str(out), "--no-measure", "--code", str(code)).stdout
    assert "has changed since it trained" in " ".join(reported.split())
    resumed = run_command("train", str(code), "--out", str(out), "--optim.lr", "0.05", "--resume")
    assert resumed.returncode == 2
    assert "code_sha256" in resumed.stderr


def test_what_needs_the_layers_of_an_own_network_says_so(code, tmp_path):
    out = tmp_path / "run"
    assert run_command("train", str(code), "--out", str(out)).returncode == 0
    np.save(tmp_path / "frames.npy", np.zeros((4, 1, 28, 28), np.uint8))
    for command in (
        ("export", str(out), "--to", "int8"),
        ("export", str(out), "--to", "c"),
        ("run", str(out), str(tmp_path / "frames.npy")),
    ):
        done = run_command(*command, "--code", str(code))
        assert done.returncode == 2
        assert "needs one of multifire's networks, whose layers it knows; from-file is your own" in done.stderr
    reported = run_command("report", str(out), "--code", str(code))
    assert reported.returncode == 0, reported.stderr
    assert "needs one of multifire's networks" in " ".join(reported.stdout.split())


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("import multifire as mf\n", r"found no `recipe`, expected a RunConfig"),
        ("recipe = 3\n", r"found int as `recipe`, expected a RunConfig"),
        ("def f():\n    return 1 / 0\n\nf()\n", "ZeroDivisionError: division by zero"),
        ("recipe =\n", "SyntaxError"),
    ],
)
def test_a_recipe_file_without_recipe_or_with_a_fault_is_one_line(text, said, code, tmp_path):
    code.write_text(text)
    done = run_command("train", str(code), "--out", str(tmp_path / "run"))
    assert done.returncode == 2
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("multifire: error: ")
    assert said in last
    if "ZeroDivision" in said:
        assert done.stderr.count("Traceback") == 1
        assert "in f" in done.stderr
    assert not (tmp_path / "run").exists()


def test_a_run_folder_never_decides_that_code_is_run(code, tmp_path):
    out = tmp_path / "run"
    assert run_command("train", str(code), "--out", str(out)).returncode == 0
    witness = tmp_path / "witness"
    code.write_text(CODE + f"\nopen({str(witness)!r}, 'w')\n")
    for command in (
        ("eval", str(out)),
        ("report", str(out)),
        ("export", str(out), "--to", "int8"),
        ("summary", str(out)),
    ):
        run_command(*command)
        assert not witness.exists()


@pytest.fixture
def gated(registered):
    """Register a block, and forget it afterwards."""
    kinds, own, blocks = list(architecture.BLOCK_KINDS), set(architecture.OWN_BLOCKS), dict(resnet.ALL_BLOCKS)

    @mf.register_block("gated")
    class Gated(mf.nn.DSBlock):
        def forward(self, x_TNCHW, stream=None):
            return 0.5 * super().forward(x_TNCHW, stream)

    yield Gated
    architecture.BLOCK_KINDS[:] = kinds
    architecture.OWN_BLOCKS.clear()
    architecture.OWN_BLOCKS.update(own)
    resnet.ALL_BLOCKS.clear()
    resnet.ALL_BLOCKS.update(blocks)


def test_a_registered_block_makes_networks_that_train_stream_and_are_measured(gated, tmp_path):
    cfg = override(TINY, model={"name": "gated_resnet8"}, optim={"epochs": 1})
    train(cfg, tmp_path / "run")
    model, _ = load_model(tmp_path / "run" / "last.safetensors")
    assert isinstance(model.stages[0][0], gated)
    x_TNCHW, state = torch.rand(3, 2, 1, 12, 12), None
    model.eval()
    for frame_NCHW in x_TNCHW:
        logits, state = model.step(frame_NCHW, state)
    torch.testing.assert_close(logits, model(x_TNCHW))
    assert (tmp_path / "run" / "analysis.json").is_file()
    assert model.stages[1][0].fire1.conv.max_input is None  # it may get fractions, which no packing holds
    pytest.importorskip("nir")
    from multifire.export.nir import to_nir

    with pytest.raises(ValueError, match=r"stages\.0\.0 is a Gated, which the format cannot hold"):
        to_nir(model, (12, 12))
    with pytest.raises(ValueError, match="the block 'gated' exists already"):
        mf.register_block("gated")(gated)
    with pytest.raises(ValueError, match="unknown block 'gate'; did you mean gated"):
        mf.SpikingResNet("gate")


@pytest.mark.parametrize("block", ["ms", "sew"])
def test_one_of_multifires_networks_is_recorded_as_what_it_is(block, tmp_path):
    network = mf.SpikingResNet(block, 1, in_channels=1, width=2)
    cfg = override(TINY, optim={"epochs": 1})
    run = mf.train(cfg, tmp_path / "run", network=network)
    assert run.config.model.name == f"{block}_resnet8"
    assert run.config.model.width == 2
    model, _ = load_model(tmp_path / "run" / "last.safetensors")
    mf.load_weights(model, run)
    assert type(model.stages[0][0]) is type(network.stages[0][0])


def test_the_examples_are_short_and_run(tmp_path):
    folder = Path(__file__).parents[1] / "examples"
    examples = {
        "own_network": [tmp_path / "a"],
        "own_loss": [tmp_path / "b"],
        "own_data": [tmp_path / "c"],
        "own_block": [tmp_path / "d"],
        "plain_loop": ["2"],
    }
    for name, arguments in examples.items():
        file = folder / f"{name}.py"
        assert len(file.read_text().splitlines()) <= 40
        done = subprocess.run([sys.executable, file, *map(str, arguments)], capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        assert "held-out accuracy" in done.stdout
