"""What commands print fits a terminal of 80 columns: no broken word, no cut heading, no lines of other libraries."""

import os
import pty
import re
import subprocess
import sys

import pytest

from multifire.cli import COMMANDS
from multifire.cli.output import print_table
from multifire.utils.progress import CONSOLE

CUT = "…"
SMALL = ["--model.width", "4", "--data.limit", "64", "--optim.epochs", "1"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with two small runs."""
    folder = tmp_path_factory.mktemp("terminal")
    for out in ("runs/a", "runs/b"):
        terminal(folder, "train", "digits", *SMALL, "--out", out)
    return folder


def terminal(folder, *args: str) -> str:
    """Run a command in a terminal of 80 columns; return its output without escape sequences."""
    mine, its = pty.openpty()
    env = {**os.environ, "COLUMNS": "80", "LINES": "40", "TERM": "xterm"}
    process = subprocess.Popen(
        [sys.executable, "-m", "multifire", *args], cwd=folder, env=env, stdin=its, stdout=its, stderr=its
    )
    os.close(its)
    chunks = []
    try:
        while chunk := os.read(mine, 65536):
            chunks.append(chunk)
    except OSError:  # the terminal's other end is closed
        pass
    os.close(mine)
    text = b"".join(chunks).decode()
    assert process.wait() == 0, text
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text).replace("\r\n", "\n")


def assert_fits(text: str) -> None:
    assert CUT not in text
    for line in re.split(r"[\n\r]", text):
        assert len(line) <= 80, line


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["recipes"], ["parameters", "paper %", "dvs-gesture-modern", "4,327,754"]),
        (["data", "list"], ["download", "fashion-mnist", "8,385 MB"]),
        (["summary", "cifar10"], ["stages.2.0.shortcut", "ANN MACs", "647,694,848"]),
        (["summary", "runs/a"], ["stages.2.0.shortcut", "SynOps", "parameters"]),
        (["eval", "runs/a"], ["accuracy %", "class"]),
        (["compare", "runs/a", "runs/b"], ["test accuracy %", "of checkpoint", "parameters", "images/s"]),
        (
            ["bench", "digits", "--optim.batch-size", "2", "--model.width", "4", "--runs", "1", "--reference"],
            ["ms/image", "images/s", "× convs", "training step, convolutions alone", "reference in fp32"],
        ),
        (
            ["sweep", "grid", "digits", "--vary", "model.levels=1,3", *SMALL],
            ["model.levels", "runs finished: 2"],
        ),
    ],
    ids=lambda value: " ".join(value[:2]) if isinstance(value, list) else None,
)
def test_tables_fit_and_no_library_speaks(folder, args, words):
    text = terminal(folder, *args)
    assert_fits(text)
    for word in words:
        assert word in text
    for line in text.splitlines():
        assert not re.match(r"[A-Z]+:\d{4}-\d\d-\d\d", line), line  # a log line of a C++ library
        assert "Warning" not in line, line


@pytest.mark.parametrize("command", [command.__name__.rpartition(".")[2] for command in COMMANDS])
def test_help_fits(folder, command):
    name = {"evaluate": "eval"}.get(command, command)
    text = terminal(folder, name, "--help")
    assert_fits(text) if name not in ("train", "sweep", "bench") else None
    assert f"multifire {name}" in text


def test_training_says_what_trains_where_and_what_came_of_it(folder):
    text = terminal(folder, "train", "digits", "--model.width", "4", "--data.limit", "640", "--optim.epochs", "1")
    lines = text.splitlines()
    for name in ("recipe", "network", "data", "device", "kernel", "epochs", "folder"):
        assert any(line.startswith(f"{name:<8}") for line in lines), name
    assert "digits: 640 training and 1,000 test images" in text
    head = next(line for line in lines if "train loss" in line)
    row = next(line for line in lines if re.match(r" +1/1 ", line))
    assert len(head.rstrip()) == len(row.rstrip()) <= 80
    assert "epoch 1/1 training" in text
    assert "epoch 1/1 evaluation" in text
    assert re.search(r"held-out accuracy \d+\.\d\d % \(last checkpoint\), trained in 0:\d\d:\d\d", text)
    assert lines[-1] == "next: multifire report runs/digits"
    assert_fits(text)


def test_a_table_too_wide_becomes_one_line_for_each_cell(capsys):
    rows = [["a" * 60, "b" * 60], ["c", "d"]]
    print_table(["first", "second heading"], rows, title="wide")
    out = capsys.readouterr().out
    assert f"first           {'a' * 60}\nsecond heading  {'b' * 60}\n" in out
    assert CONSOLE.width == 80


NOTEBOOK = """
import builtins
class ZMQInteractiveShell: pass  # rich knows a notebook by it
builtins.get_ipython = ZMQInteractiveShell
from multifire.utils.progress import CONSOLE, Bar
with Bar("training", 1) as bar:
    CONSOLE.print("[bold]text[/]")
    bar.update(1, "loss 1")
"""


def test_a_notebook_shows_lines_of_text():
    ended = subprocess.run([sys.executable, "-c", NOTEBOOK], capture_output=True, text=True, check=True, timeout=100)
    assert ended.stdout == "text\n"
