"""Event data from the command line to a trained network: small archives, real processes where people use them."""

import re
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent / "datasets"))
from makers import gesture_archive, nmnist_zip

from multifire.cli import main
from multifire.config import RECIPES, RunConfig, TrainOptions, get_recipe
from multifire.datasets.prepare import prepare
from multifire.experiments.score import evaluate_run
from multifire.training.checkpoint import load_checkpoint
from multifire.training.loop import train
from multifire.training.run_folder import RunFolder
from multifire.training.signals import Interrupted


def tiny(root: Path, **data) -> RunConfig:
    cfg = get_recipe("nmnist")
    return replace(
        cfg,
        data=replace(cfg.data, root=str(root), timesteps=3, **data),
        model=replace(cfg.model, width=8),
        optim=replace(cfg.optim, epochs=2, batch_size=8),
    )


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("data")
    nmnist_zip(root / "nmnist" / "n.zip", train=40, test=20)
    prepare(tiny(root).data, root, workers=1)
    return root


def test_events_train_resume_and_are_scored_like_images(root, tmp_path, monkeypatch):

    cfg = tiny(root)
    whole = train(cfg, tmp_path / "whole")
    from multifire.training import captured

    step, calls = captured.train_step, iter(range(100))

    def pressed(*args):
        import signal

        if next(calls) == 7:
            signal.raise_signal(signal.SIGINT)
        return step(*args)

    monkeypatch.setattr(captured, "train_step", pressed)
    with pytest.raises(Interrupted):
        train(cfg, tmp_path / "stopped")
    monkeypatch.undo()
    train(cfg, tmp_path / "stopped", TrainOptions(resume="yes"))
    first, second = (load_checkpoint(tmp_path / name / "last.safetensors").model for name in ("whole", "stopped"))
    assert all(torch.equal(first[name], tensor) for name, tensor in second.items())
    figures, _ = evaluate_run(tmp_path / "whole", None, None, "cpu", None)
    assert figures["count"] == 20
    assert figures["accuracy"] == whole["test_accuracy"]
    assert len(RunFolder(tmp_path / "whole").metrics()[0]["test_accuracy_per_step"]) == 3


def test_a_limit_and_a_validation_share_choose_rows(root, tmp_path):
    cfg = tiny(root, limit=16, validation=0.25)
    assert train(cfg, tmp_path / "run")["best"]["chosen_by"] == "validation"


@pytest.mark.parametrize(
    ("recipe", "option", "message"),
    [
        ("nmnist", {"crop_padding": 2}, "data.crop_padding is 2, but nmnist holds events; leave it out"),
        ("digits", {"roll": 2}, "data.roll is 2, but digits holds images; leave it out"),
    ],
)
def test_augmentation_of_the_other_kind_is_refused(root, tmp_path, recipe, option, message):
    cfg = tiny(root, **option) if recipe == "nmnist" else get_recipe(recipe)
    if recipe == "digits":
        cfg = replace(cfg, data=replace(cfg.data, **option))
    with pytest.raises(ValueError, match=message):
        train(cfg, tmp_path / "run")


def test_a_damaged_cache_stops_a_run_before_it_begins(root, tmp_path):
    cfg = tiny(root, slicing="count")
    folder = prepare(cfg.data, root, workers=1)
    (folder / "train.npy").write_bytes((folder / "train.npy").read_bytes()[:-1] + b"\xff")
    with pytest.raises(ValueError, match=r"train\.npy: damaged.*--slicing count --rebuild"):
        train(cfg, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_command_line_from_archive_to_picture_to_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    archive = gesture_archive(tmp_path / "elsewhere")
    frames = ["--timesteps", "4", "--frame-size", "16"]
    assert main(["data", "prepare", "dvs-gesture", "--source", str(archive), *frames]) == 0
    said = capsys.readouterr().out
    assert "36 training and 24 test samples in data/dvs-gesture/frames/T4-16x16-duration-" in said
    assert re.search(r"left hand wave .* 3 .* 2 ", said)
    sheet = tmp_path / re.search(r"picture: (\S+)", said)[1]
    assert sheet.read_bytes().startswith(b"\x89PNG")

    assert main(["data", "info", "dvs-gesture", *frames]) == 0
    assert "frames [T, 2, H, W] = [4, 2, 16, 16], of 30 ms" in capsys.readouterr().out
    assert main(["data", "show", "dvs-gesture", "2", *frames]) == 0
    assert capsys.readouterr().out == "user01_lab/02: left hand wave; written to dvs-gesture-train-2.gif\n"
    assert (tmp_path / "dvs-gesture-train-2.gif").read_bytes().startswith(b"GIF89a")
    assert main(["data", "show", "dvs-gesture", "1", "--split", "test", "--out", "x.png", *frames]) == 0
    assert b"acTL" in (tmp_path / "x.png").read_bytes()

    overrides = "--data.timesteps 4 --data.frame-size 16 --model.name ds_resnet8 --model.width 8 --optim.epochs 1"
    assert main(["train", "dvs-gesture", "--out", "run", *overrides.split()]) == 0
    assert "held-out accuracy" in capsys.readouterr().out


def test_training_prepares_what_lies_in_the_root(root, tmp_path, capsys):
    overrides = f"--data.root {root} --data.timesteps 2 --model.width 8 --optim.epochs 1"
    assert main(["train", "nmnist", "--out", str(tmp_path / "run"), *overrides.split()]) == 0
    assert "samples/s\nnext: multifire report" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("data", "prepare", "digits"), "digits holds images, which need no preparation; event sets: dvs-gesture,"),
        (("data", "prepare", "nmnst"), "unknown data set 'nmnst'; did you mean nmnist?"),
        (("data", "prepare", "nmnist"), "no recordings of nmnist in data/nmnist: expected Train.zip and Test.zip"),
        (("data", "prepare", "nmnist", "--source", "nowhere"), "nowhere: no such file or folder"),
        (("data", "prepare", "nmnist", "--workers", "0"), "workers is 0, expected at least 1"),
        (("data", "prepare", "nmnist", "--timesteps", "0"), "data.timesteps is 0, expected at least 1"),
        (("data", "prepare", "nmnist", "--frame-size", "0"), "data.frame_size is 0, expected at least 1"),
        (("data", "prepare", "nmnist", "--slicing", "x"), "unknown slicing 'x'; known: duration, time, count"),
        (("data", "info", "nmnist"), "nmnist is not prepared; run `multifire data prepare nmnist --root data`"),
        (("data", "show", "nmnist", "0"), "nmnist is not prepared"),
        (("data", "download", "dvs-gesture"), "dvs-gesture cannot be downloaded by a program: IBM asks who"),
        (("train", "dvs-gesture"), "no recordings of dvs-gesture in data/dvs-gesture: expected DvsGesture.tar.gz"),
        (("train", "nmnist", "--data.roll", "-1"), "data.roll is -1, expected at least 0"),
        (("train", "nmnist", "--data.rotation", "200"), "data.rotation is 200.0, expected at most 180 degrees"),
        (("train", "nmnist", "--data.swap-polarity", "2"), "data.swap_polarity is 2.0, expected 0 <= probability <= 1"),
    ],
)
def test_mistakes_are_one_line(capsys, tmp_path, monkeypatch, args, message):
    monkeypatch.chdir(tmp_path)
    assert main(args) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert message in err
    assert not list(tmp_path.iterdir())


def test_showing_what_is_not_there(root, tmp_path, capsys):
    options = ["--root", str(root), "--timesteps", "3"]
    for args, message in (
        (["40"], "sample 40, expected 0 to 39 of nmnist's train split"),
        (["-1"], "sample -1, expected 0 to 39"),
        (["0", "--out", str(tmp_path / "x.mp4")], "x.mp4: ends in '.mp4', expected .gif or .png"),
        (["0", "--out", str(tmp_path / "no" / "x.gif")], "no: no such folder; make it, or write elsewhere"),
    ):
        assert main(["data", "show", "nmnist", *args, *options]) == 2
        assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_simulated_is_said_wherever_it_shows(tmp_path, monkeypatch, capsys):
    """With a few of the digits, for speed."""
    from multifire.datasets import digits_dvs

    whole = digits_dvs.read_digits()
    few = tuple((images[:60], labels[:60]) for images, labels in whole)
    monkeypatch.setattr(digits_dvs, "read_digits", lambda: few)
    monkeypatch.chdir(tmp_path)
    for cached in (digits_dvs._simulated,):
        cached.cache_clear()
    assert main(["data", "prepare", "digits-dvs", "--workers", "1"]) == 0
    said = capsys.readouterr().out
    assert "digits-dvs (simulated)" in said
    assert "these events are simulated" in said
    assert main(["data", "show", "digits-dvs", "0"]) == 0
    assert ", simulated" in capsys.readouterr().out
    assert main(["data", "list"]) == 0
    assert "simulated" in capsys.readouterr().out
    assert main(["train", "digits-dvs", "--out", "run", "--optim.epochs", "1", "--model.width", "8"]) == 0
    assert "the events were simulated from images, not recorded with a camera" in capsys.readouterr().out
    assert '"simulated": true' in Path("run/summary.json").read_text()
    digits_dvs._simulated.cache_clear()


def test_the_paper_s_event_recipes():
    gesture, cifar = (get_recipe(name) for name in ("dvs-gesture", "cifar10-dvs"))
    assert (gesture.data.timesteps, gesture.data.duration_us, gesture.data.frame_size) == (40, 30_000, 32)
    assert (cifar.data.timesteps, cifar.data.duration_us, cifar.data.frame_size) == (10, 10_000, 42)
    assert cifar.data.bin_factor == 3.04
    assert (gesture.model.name, gesture.model.width, gesture.model.norm_input) == ("ds_resnet20", 16, True)
    assert (cifar.model.name, cifar.model.width, cifar.model.norm_input) == ("ds_resnet14", 32, False)
    assert (gesture.optim.batch_size, gesture.optim.epochs, gesture.optim.weight_decay) == (28, 120, 1e-4)
    assert (cifar.optim.batch_size, cifar.optim.epochs, cifar.optim.weight_decay) == (32, 100, 1e-3)
    for cfg in (gesture, cifar):
        assert (cfg.optim.lr, cfg.optim.schedule, cfg.optim.step_epochs, cfg.optim.gamma) == (0.1, "step", 40, 0.1)
        assert not any((cfg.data.flip, cfg.data.roll, cfg.data.rotation, cfg.data.cutout, cfg.data.time_jitter))
    from multifire.config.parameters import count_parameters

    assert [count_parameters(cfg.model) for cfg in (gesture, cifar)] == [272_395, 696_330]


@pytest.mark.parametrize("name", [name for name in RECIPES if name.endswith("-modern")])
def test_modern_recipes_augment_and_share_the_paper_s_frames(name):
    from multifire.datasets.cache import cache_folder

    modern, paper = get_recipe(name).data, get_recipe(name.removesuffix("-modern")).data
    assert cache_folder(modern, Path()) == cache_folder(paper, Path())
    assert modern.flip
    assert modern.roll


@pytest.mark.slow
def test_the_demo_with_events_reaches_its_target(tmp_path, monkeypatch):
    import json

    monkeypatch.chdir(tmp_path)
    assert main(["demo", "--events", "--out", "run"]) == 0
    assert json.loads(Path("run/summary.json").read_text())["test_accuracy"] >= 0.95


SHARED = Path(__file__).parents[2] / "shared" / "data" / "nmnist-1100.zip"


@pytest.mark.slow
@pytest.mark.skipif(not SHARED.is_file(), reason="the shared N-MNIST recordings are not here")
def test_real_nmnist_reaches_its_target(tmp_path, monkeypatch):
    import json

    monkeypatch.chdir(tmp_path)
    assert main(["data", "prepare", "nmnist", "--source", str(SHARED)]) == 0
    assert main(["train", "nmnist", "--out", "run"]) == 0
    assert json.loads(Path("run/summary.json").read_text())["test_accuracy"] >= 0.90
    assert np.isfinite(RunFolder(Path("run")).metrics()[-1]["train_loss"])
