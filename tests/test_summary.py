"""`multifire summary`: the table of an untrained and of a trained network."""

import pytest
import torch

from multifire.cli import main
from multifire.config import get_recipe
from multifire.config.parameters import count_parameters
from multifire.experiments.summary import summarise
from multifire.nn import kept_for_backward, model_from_config
from multifire.training.loop import train
from tests.test_cli import error_of
from tests.test_train import TINY, override


def test_summary_of_a_recipe():
    found = summarise("digits")
    cfg = get_recipe("digits")
    assert found.parameters == count_parameters(cfg.model)
    assert [row.name for row in found.rows][:3] == ["stem", "stages.0.0.fire1", "stages.0.0.fire2"]
    assert found.rows[0].ann_macs == found.rows[0].macs == 16 * 28 * 28 * 9  # a static image, counted once
    assert found.rows[1].shape == (16, 28, 28)
    assert all(row.synops for row in found.rows[1:-1])
    image = torch.rand(1, cfg.optim.batch_size, 1, 28, 28)
    kept = kept_for_backward(model_from_config(cfg.model), image.expand(4, *image.shape[1:])).bytes
    assert found.kept_bytes == pytest.approx(kept, rel=0.01)
    assert found.state_bytes == 3 * 4 * found.parameters


def test_adamw_keeps_two_moments(tmp_path):
    cfg = override(TINY, optim={"epochs": 1, "optimizer": "adamw"}, data={"limit": 32})
    train(cfg, tmp_path / "run")
    found = summarise(str(tmp_path / "run"))
    assert found.state_bytes == 4 * 4 * found.parameters


def test_summary_of_a_run(tmp_path, capsys):
    cfg = override(TINY, model={"name": "plain_resnet8"}, optim={"epochs": 1}, data={"limit": 32})
    train(cfg, tmp_path / "run")
    found = summarise(str(tmp_path / "run"))
    assert ("stages.0.0.shortcut", "identity") in {(row.name, row.kind) for row in found.rows}
    assert found.parameters == count_parameters(cfg.model)
    capsys.readouterr()
    assert main(["summary", str(tmp_path / "run")]) == 0
    out = capsys.readouterr().out
    assert f"{found.energy.ann_macs:,}" in out
    assert "last checkpoint" in out
    assert "mean of 16 test samples" in out
    (tmp_path / "run" / "last.safetensors").unlink()
    assert "no last.safetensors" in error_of(capsys, "summary", str(tmp_path / "run"))


@pytest.mark.parametrize("recipe", ["cifar10-small", "nmnist"])
def test_summary_without_the_data(tmp_path, capsys, recipe):
    assert main(["summary", recipe, "--root", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "SynOps are not counted" in out
    assert "multifire data" in out
    assert f"{count_parameters(get_recipe(recipe).model):,}" in out


def test_a_name_that_is_neither_recipe_nor_run_is_refused(tmp_path, capsys):
    assert "did you mean digits?" in error_of(capsys, "summary", "digit")
    assert "no config.json" in error_of(capsys, "summary", str(tmp_path))
