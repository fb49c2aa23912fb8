"""The exported C folder builds without a warning, and its program prints the logits of `mf.load_int8`."""

import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

import multifire as mf
from multifire.cli import main
from multifire.config import get_recipe, json_format
from multifire.engine.c_source import write_c
from multifire.nn import model_from_config
from multifire.training.checkpoint import Checkpoint, Position, save_checkpoint
from tests.test_train import override

COMPILERS = [name for name in ("g++", "clang++") if shutil.which(name)]
pytestmark = pytest.mark.skipif(not COMPILERS, reason="needs a C++ compiler")


def make_run(folder: Path, recipe: str) -> Path:
    """Create a run with random weights and running statistics of random inputs; return its folder."""
    cfg = override(get_recipe(recipe), model={"width": 4, "name": "ds_resnet8"}, data={"timesteps": 3})
    torch.manual_seed(0)
    model = model_from_config(cfg.model)
    size = cfg.data.frame_size if recipe == "nmnist" else 28
    for _ in range(3):
        model(torch.randint(0, 3, (3, 8, cfg.model.in_channels, size, size)).float())
    folder.mkdir(exist_ok=True)
    save_checkpoint(folder / "last.safetensors", Checkpoint(cfg, Position(epoch=1), model.state_dict(), {}))
    (folder / "config.json").write_text(json_format.to_json(cfg))
    return folder


def build(folder: Path, compiler: str, level: str = "-O3") -> Path:
    """Build the folder as its README says, with every warning an error."""
    warnings = ["-Wall", "-Wextra", "-Werror"]
    c = {"g++": "gcc", "clang++": "clang"}[compiler]
    for command in (
        [compiler, "-std=c++17", level, "-ffp-contract=off", *warnings, "-c", "multifire_engine.cpp"],
        [c, "-std=c99", "-O2", *warnings, "-c", "network.c", "main.c"],
        [compiler, "multifire_engine.o", "network.o", "main.o", "-o", "network"],
    ):
        subprocess.run(command, cwd=folder, check=True, timeout=300)
    return folder / "network"


def logits_of(program: Path, data: bytes, *options: str) -> np.ndarray:
    done = subprocess.run([program, *options], input=data, capture_output=True, timeout=60, check=True)
    lines = re.findall(r"logits (.*)", done.stdout.decode())
    return np.array([list(map(float, line.split())) for line in lines], np.float32)


@pytest.fixture(scope="module")
def events_program(tmp_path_factory):
    run = make_run(tmp_path_factory.mktemp("events"), "nmnist")
    assert main(["export", str(run), "--to", "c"]) == 0
    assert main(["export", str(run), "--to", "int8"]) == 0
    return build(run / "last-c", COMPILERS[0], "-O1"), mf.load_int8(run / "last-int8.safetensors")


def expected_steps(network, frames_TCHW: np.ndarray) -> np.ndarray:
    out, state = [], None
    for t, frame in enumerate(frames_TCHW):
        logits, state = network.step(torch.from_numpy(frame)[None], state if t % 3 else None)
        out.append(logits[0].numpy())
    return np.array(out)


def test_frames_of_counts(events_program):
    program, network = events_program
    frames = np.random.default_rng(0).integers(0, 3, (7, 2, 17, 17)).astype(np.float32)
    assert np.array_equal(logits_of(program, frames.tobytes()), expected_steps(network, frames))


def test_events_as_text(events_program):
    program, network = events_program
    frames = np.random.default_rng(1).integers(0, 40, (4, 2, 17, 17)) % 37 // 36
    frames[2] = 0
    text = "".join(
        "".join(f"{x} {y} {p} {frame[p, y, x]}\n" for p, y, x in np.argwhere(frame)) + "\n" for frame in frames
    )
    found = logits_of(program, text.encode(), "--events")
    assert np.array_equal(found, expected_steps(network, frames.astype(np.float32)))


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        (b"1 2\n", ["--events"], "expected lines"),
        (b"99 2 0\n", ["--events"], ""),
        (b"\0" * 10, [], "the last frame is incomplete"),
        (b"", ["--help"], "usage: program"),
    ],
)
def test_bad_input_is_a_sentence(events_program, data, options, message):
    program, _ = events_program
    done = subprocess.run([program, *options], input=data, capture_output=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr.decode().startswith("error: ")
    assert message in done.stderr.decode()


@pytest.mark.slow
@pytest.mark.parametrize("compiler", COMPILERS)
def test_images(compiler, tmp_path):
    run = make_run(tmp_path / "run", "digits")
    program = build(write_c(run, tmp_path / "c"), compiler)
    assert main(["export", str(run), "--to", "int8"]) == 0
    network = mf.load_int8(run / "last-int8.safetensors")
    images = np.random.default_rng(2).normal(size=(3, 1, 28, 28)).astype(np.float32)
    expected = network(torch.from_numpy(images).expand(3, 3, 1, 28, 28)).numpy()
    np.testing.assert_allclose(logits_of(program, images.tobytes()), expected, rtol=1e-6)


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("cmake"), reason="needs CMake")
def test_its_cmake_project(tmp_path):
    folder = write_c(make_run(tmp_path / "run", "nmnist"), tmp_path / "c")
    subprocess.run(["cmake", "-S", folder, "-B", tmp_path / "build"], check=True, timeout=120)
    subprocess.run(["cmake", "--build", tmp_path / "build"], check=True, timeout=300)
    frame = np.zeros((2, 17, 17), np.float32)
    assert logits_of(tmp_path / "build" / "network", frame.tobytes()).shape == (1, 10)


def test_the_source_includes_no_other_file_of_ours(tmp_path):
    folder = write_c(make_run(tmp_path / "run", "nmnist"), tmp_path / "c")
    own = re.findall(r'#include "(.*)"', (folder / "multifire_engine.cpp").read_text())
    assert own == ["multifire_engine.h"]
    assert "@" not in (folder / "network.h").read_text() + (folder / "main.c").read_text()
