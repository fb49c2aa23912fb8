"""Configurations: recipes, JSON, range checks, and the learning-rate schedules that they describe."""

import json
import math
from dataclasses import replace

import pytest

from multifire.config import RECIPES, DataConfig, ModelConfig, OptimConfig, RunConfig, get_recipe, json_format
from multifire.training.optim import learning_rate


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_are_equal_after_writing_and_reading_json(name):
    cfg = get_recipe(name)
    assert cfg.recipe == name
    assert json_format.from_json(json_format.to_json(cfg), "config.json") == cfg


def test_thresholds_come_back_as_a_tuple():
    cfg = RunConfig(model=replace(RunConfig().model, levels=2, thresholds=(0.5, 1.0)))
    assert json_format.from_json(json_format.to_json(cfg), "config.json") == cfg


def changed(**values) -> str:
    """Return the JSON of the default configuration with these values replaced."""
    return json.dumps(json.loads(json_format.to_json(RunConfig())) | values)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not a config file"),
        ("[]", "found list, expected an object"),
        (changed(version=99), "config version is 99, this multifire reads version 1"),
        (json.dumps({}), "config version is None"),
        (changed(sed=1), r"unknown field sed; did you mean seed\?"),
        (changed(data={"nam": "x"}), r"unknown field data\.nam; did you mean name\?"),
        (changed(seed="one"), "field seed is 'one', expected int"),
        (changed(precision="fp8"), "field precision is 'fp8', expected .*fp32"),
        (changed(optim={"lr": None}), r"field optim\.lr is None, expected float"),
        (changed(model={"thresholds": [1, "a", 3]}), r"field model\.thresholds is 'a', expected float"),
        (changed(data=3), "field data is 3, expected DataConfig"),
    ],
)
def test_bad_files_are_refused(text, message):
    with pytest.raises(ValueError, match=message):
        json_format.from_json(text, "run/config.json")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RunConfig(data=DataConfig(timesteps=0)), r"data\.timesteps is 0, expected at least 1"),
        (lambda: RunConfig(model=ModelConfig(num_classes=-1)), r"model\.num_classes is -1, expected at least 1"),
        (lambda: RunConfig(model=ModelConfig(in_channels=0)), r"model\.in_channels is 0, expected at least 1"),
        (lambda: RunConfig(model=ModelConfig(levels=10**12)), r"model\.levels is 10{12}, expected 1 to 64"),
        (lambda: RunConfig(data=DataConfig(validation=1.0)), r"data\.validation is 1\.0, expected 0 <= fraction < 1"),
        (lambda: RunConfig(optim=OptimConfig(lr=math.nan)), r"optim\.lr is nan, expected a finite number"),
        (lambda: RunConfig(optim=OptimConfig(batch_size=0)), r"optim\.batch_size is 0"),
        (lambda: RunConfig(precision="fp16"), r"precision is 'fp16', expected one of fp32, bf16"),
        (
            lambda: RunConfig(optim=OptimConfig(optimizer="adam")),
            r"optim\.optimizer is 'adam', expected one of sgd, a",
        ),
        (lambda: RunConfig(optim=OptimConfig(schedule="constant")), r"optim\.schedule is 'constant'"),
        (lambda: RunConfig(data=DataConfig(slicing="TIME")), r"data\.slicing is 'TIME'"),
    ],
)
def test_values_out_of_range_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_the_step_schedule_equals_the_papers():
    optim = OptimConfig(epochs=110, lr=0.1, schedule="step", step_epochs=40, gamma=0.1)
    rates = [learning_rate(optim, epoch * 10, 10) for epoch in (0, 39, 40, 79, 80, 109)]
    assert rates == pytest.approx([0.1, 0.1, 0.01, 0.01, 0.001, 0.001])


@pytest.mark.parametrize("schedule", ["cosine", "one-cycle"])
def test_cosine_and_one_cycle_schedules_equal_torchs(schedule):
    import torch

    optim = OptimConfig(epochs=4, lr=0.3, schedule=schedule, warmup_share=0.25)
    total = 40
    sgd = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.3, momentum=0.9)
    if schedule == "cosine":
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(sgd, total)
    else:
        # torch reaches its last rate at step total - 1, and its highest at step pct_start·total - 1.
        scheduler = torch.optim.lr_scheduler.OneCycleLR(
            sgd, 0.3, total_steps=total + 1, pct_start=11 / 41, cycle_momentum=False, final_div_factor=1e4 / 25
        )
    for step in range(total):
        assert learning_rate(optim, step, 10) == pytest.approx(sgd.param_groups[0]["lr"], rel=1e-9)
        sgd.step()
        scheduler.step()


@pytest.mark.parametrize("schedule", ["step", "cosine"])
def test_warm_up_scales_the_first_learning_rates(schedule):
    plain, warm = (OptimConfig(epochs=10, schedule=schedule, warmup_epochs=epochs) for epochs in (0.0, 2.0))
    factors = [learning_rate(warm, step, 10) / learning_rate(plain, step, 10) for step in range(30)]
    assert factors == pytest.approx([*((step + 1) / 20 for step in range(20)), *[1.0] * 10])
