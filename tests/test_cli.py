"""The command line as a user sees it: help, messages, exit codes."""

import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from multifire import __version__
from multifire.cli import main
from multifire.cli.demo import grey_blocks
from multifire.cli.overrides import parse_overrides
from multifire.cli.train import TrainArguments
from multifire.config import RECIPES, get_recipe


def run(*args: str, cwd: Path | None = None, timeout: float = 120) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "multifire", *args],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def error_of(capsys, *args: str) -> str:
    """Return the message of a command that must fail with exit code 2 and one line on standard error."""
    assert main(args) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith("multifire: error: ")
    return err


def test_version_and_help():
    assert run("--version").stdout == f"multifire {__version__}\n"
    done = run("--help")
    assert done.returncode == 0
    assert all(command in done.stdout for command in ("demo", "train", "eval", "recipes", "data"))
    assert "multifire train RECIPE" in run("train", "--help").stdout


def test_without_a_command_it_names_three_to_try_first():
    done = run()
    assert done.returncode == 0
    assert done.stdout.count("\n  multifire ") == 3


def test_the_pretrained_demo_shows_digits_dormant_units_energy_and_a_recording(capsys):
    assert main(["demo", "--pretrained"]) == 0
    out = capsys.readouterr().out
    assert all(f"a {digit}: the network says" in out for digit in range(10))
    assert "accuracy on 1,000 test digits: 98" in out
    assert all(text in out for text in ("dormant units", "synaptic operations", "simulated recording", "ON", "OFF"))


def test_digits_are_drawn_as_half_blocks():
    pictures = np.zeros((2, 4, 3), np.uint8)
    pictures[1, 0] = 255
    text = grey_blocks(pictures)
    assert text.plain == "▀▀▀▀▀▀\n▀▀▀▀▀▀\n"
    assert str(text.spans[3].style) == "rgb(255,255,255) on rgb(0,0,0)"


def test_help_of_a_recipe_lists_every_override():
    done = run("train", "cifar10", "--help")
    assert done.returncode == 0
    for option in ("--data.validation", "--optim.label-smoothing", "--model.thresholds", "--resume", "--out", "--seed"):
        assert option in done.stdout


@pytest.mark.parametrize("command", ["recipes", "--help"])
def test_help_and_recipes_do_not_import_torch_or_numpy(command):
    program = (
        "import sys; from multifire.cli import main\n"
        f"try: main([{command!r}])\nexcept SystemExit: pass\n"
        "sys.exit(any(name in sys.modules for name in ('torch', 'numpy')))"
    )
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, check=False).returncode == 0


def test_the_table_of_recipes(capsys):
    assert main(["recipes"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"cifar10 .* 4 .* 20 .* 64 .* 4,327,754 .* 94\.25", out)
    assert all(name in out for name in RECIPES)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("trian",), "unknown command 'trian'; did you mean train?"),
        (("train", "digit"), "unknown recipe 'digit'; did you mean digits? known: digits, "),
        (("train", "--seed", "1"), "expected a recipe before --seed"),
        (("train", "digits", "--optim.lrr", "1"), "unknown override '--optim.lrr'; did you mean --optim.lr?"),
        (("train", "digits", "--optim.batch_sise", "1"), "did you mean --optim.batch-size?"),
        (("train", "digits", "extra"), "unknown override 'extra'"),
        (("train", "digits", "--optim.lr", "fast"), "could not convert string to float: 'fast'"),
        (("train", "digits", "--optim.schedule", "linear"), "invalid choice 'linear' for argument '--optim.schedule'"),
        (("train", "digits", "--optim.epochs"), "Missing value for argument '--optim.epochs'"),
        (("train", "digits", "--optim.epochs", "0"), "optim.epochs is 0, expected at least 1"),
        (("train", "digits", "--model.name", "resnet18"), "expected ds_resnetD, plain_resnetD, ms_resnetD"),
        (("train", "digits", "--device", "gpu"), "unknown device 'gpu', expected auto, cpu, cuda or cuda:N"),
        (("train", "digits", "--data.name", "digit"), "unknown data set 'digit'; did you mean digits?"),
        (("train", "digits", "--model.in-channels", "3"), "model.in_channels is 3, but digits has 1"),
        (("train", "digits", "--backend", "gpu"), "unknown backend 'gpu'"),
        (("eval", "nowhere"), "nowhere: no config.json"),
        (("eval", "nowhere", "--batch-size", "0"), "batch size is 0, expected at least 1"),
        (("train", "digits", "--model.decay", "nan"), "model.decay is nan, expected a finite number"),
        (("train", "digits", "--seed", "-1"), "seed is -1, expected 0 <= seed"),
        (("eval", "x", "--checkpoint", "first"), "unknown checkpoint 'first'; known: best, last"),
        (("data", "download", "cifar-10"), "unknown data set 'cifar-10'; did you mean cifar10?"),
        (("data", "download", "digits"), "digits is embedded; nothing to download"),
        (("data",), "required: command"),
        (("bench", "digit"), "unknown recipe 'digit'; did you mean digits?"),
        (("bench", "digits", "--rums", "3"), "unknown override '--rums'; did you mean --runs?"),
        (("bench", "digits", "--runs", "0"), "runs is 0, expected at least 1"),
    ],
)
def test_a_mistake_prints_one_line_and_writes_nothing(capsys, tmp_path, monkeypatch, args, message):
    monkeypatch.chdir(tmp_path)
    assert message in error_of(capsys, *args)
    assert list(tmp_path.iterdir()) == []


def test_overrides_reach_the_configuration():
    args = (
        "--optim.lr 0.5 --data.flip --model.levels 2 --model.thresholds 0.5 1.5 --out here --resume --optim.clip-norm 1"
    )
    cfg, options = parse_overrides(get_recipe("digits"), args.split(), "train", TrainArguments)
    assert (cfg.optim.lr, cfg.data.flip, cfg.model.thresholds, cfg.optim.clip_norm) == (0.5, True, (0.5, 1.5), 1.0)
    assert (options.out, options.resume, cfg.recipe) == (Path("here"), "yes", "digits")
    assert cfg.optim.epochs == get_recipe("digits").optim.epochs


def test_a_closed_pipe_is_no_error():
    process = subprocess.Popen(
        [sys.executable, "-m", "multifire", "recipes"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    process.stdout.close()
    assert "Traceback" not in process.stderr.read()
    process.wait(timeout=60)


def test_interrupt_training_then_refuse_wrong_options_then_eval(tmp_path):
    """Ctrl-C makes the process write a checkpoint and exit with code 130; `eval` then scores the stopped run."""
    small = ["--model.width", "4", "--data.limit", "640", "--optim.epochs", "2", "--out", "run"]
    process = subprocess.Popen(
        [sys.executable, "-m", "multifire", "train", "digits", *small, "--optim.epochs", "200"],
        cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 90
    while not metrics.exists() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(2)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "give --resume to continue" in err
    assert "Traceback" not in err

    refused = run("train", "digits", *small, cwd=tmp_path)
    assert refused.returncode == 2
    assert "run exists; give --resume to continue it, or --out for another folder" in refused.stderr

    other = run("train", "digits", *small, "--resume", cwd=tmp_path)
    assert other.returncode == 2
    assert "another configuration (optim.epochs 200 -> 2)" in other.stderr

    scored = run("eval", "run", cwd=tmp_path)
    assert scored.returncode == 0, scored.stderr
    assert re.search(r"accuracy \d+\.\d\d %, loss", scored.stdout)
    assert (tmp_path / "run" / "eval-last.json").is_file()
