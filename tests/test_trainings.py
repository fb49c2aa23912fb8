"""The trainings of the results run, stop, continue, and write a row for each epoch."""

import torch

import multifire as mf
from benchmarks import results
from benchmarks.gpu_parts.epoch import write_random_images
from benchmarks.relu import relu_resnet20
from benchmarks.tables import read_csv
from benchmarks.trainings import TRAININGS, chosen
from multifire.datasets.images import CIFAR_SUBFOLDER
from multifire.nn import model_from_config

WANTED = ["cifar10-relu", "cifar10-t1-k8", "search-all"]


def test_trainings_run_stop_and_continue(tmp_path, capsys):
    write_random_images(tmp_path / "data" / CIFAR_SUBFOLDER, 10)
    call = ["--state", str(tmp_path / "state"), "--root", str(tmp_path / "data"), "--out", str(tmp_path), "--tiny"]
    assert results.main([*call, "--minutes", "0", "--only", *WANTED]) == 0
    assert "cifar10-relu: no time is left" in capsys.readouterr().out
    assert read_csv(tmp_path / "trainings.csv") == []

    assert results.main([*call, "--minutes", "5", "--only", *WANTED[:1]]) == 0
    assert results.main([*call, "--minutes", "5", "--only", *WANTED]) == 0
    rows = read_csv(tmp_path / "trainings.csv")
    assert [(row["name"], row["epoch"]) for row in rows] == [(name, epoch) for name in WANTED for epoch in "12"]
    for row in rows:
        split = "validation" if row["name"] == "search-all" else "test"
        assert 0 <= float(row[f"{split}_accuracy"]) <= 1
        assert "--model.width 4" in row["options"]
    assert not rows[-1]["test_accuracy"]  # a short run must not show it

    (tmp_path / "trainings.csv").unlink()  # the runs in the state folder still have their figures
    assert results.main([*call, "--minutes", "5", "--only", *WANTED[:1]]) == 0
    assert read_csv(tmp_path / "trainings.csv") == rows[:2]


def test_the_relu_network_has_the_parameters_of_the_spiking_one():
    cfg = mf.recipe("cifar10", **{"model.width": 8}).model
    ours, spiking = relu_resnet20(cfg), model_from_config(cfg)
    sizes = [sorted(p.shape for p in network.parameters()) for network in (ours, spiking)]
    assert sizes[0] == sizes[1]
    assert ours(torch.rand(2, 3, 3, 32, 32)).shape == (2, 3, 10)


def test_every_training_is_a_valid_configuration():
    assert len({training.name for training in TRAININGS}) == len(TRAININGS)
    for training in chosen(None):
        assert mf.recipe(training.recipe, **training.options).recipe == training.recipe
