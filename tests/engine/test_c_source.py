"""The exported C folder builds without a warning, and its program prints the logits of `mf.load_int8`.

Its engine computes their bits on every instruction set that this machine has or QEMU emulates.
"""

import dataclasses
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
from tests.engine.networks import (
    COUNTS,
    NETWORKS,
    assert_same_bits,
    random_frames,
    random_network,
    save,
    sparser_networks,
)
from tests.engine.toolchains import TOOLCHAINS, Toolchain
from tests.test_train import override

NEON = {"neon", "neon_dotprod"}
NATIVE = [toolchain for toolchain in TOOLCHAINS.values() if not toolchain.is_arm]
pytestmark = pytest.mark.skipif(not NATIVE, reason="needs a C++ compiler")


@pytest.fixture(scope="module", params=["gcc", "clang", "gcc-aarch64", "clang-aarch64"])
def toolchain(request) -> Toolchain:
    if request.param not in TOOLCHAINS:
        pytest.skip(f"{request.param}: needs the compiler" + ", and qemu-aarch64" * ("aarch64" in request.param))
    return TOOLCHAINS[request.param]


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


def build(folder: Path, toolchain: Toolchain, level: str = "-O3") -> Path:
    """Build the folder as its README says."""
    return toolchain.build(folder, level, ["multifire_engine.cpp"], ["network.c", "main.c"])


def logits_of(program: Path, data: bytes, *options: str, runs_with: tuple[str, ...] = ()) -> np.ndarray:
    done = subprocess.run([*runs_with, program, *options], input=data, capture_output=True, timeout=60, check=True)
    lines = re.findall(r"logits (.*)", done.stdout.decode())
    return np.array([list(map(float, line.split())) for line in lines], np.float32)


@pytest.fixture(scope="module")
def events_program(tmp_path_factory):
    run = make_run(tmp_path_factory.mktemp("events"), "nmnist")
    assert main(["export", str(run), "--to", "c"]) == 0
    assert main(["export", str(run), "--to", "int8"]) == 0
    return build(run / "last-c", NATIVE[0], "-O1"), mf.load_int8(run / "last-int8.safetensors")


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
        (b"99 2 0\n", ["--events"], "lies outside of the frame: x = 99, y = 2, p = 0, expected x < 17, y < 17, p < 2"),
        (b"1 1 0\n" * (2**20 + 1), ["--events"], "more than 1048576 events; end each frame with an empty line"),
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


@pytest.fixture(scope="module")
def images_run(toolchain, tmp_path_factory):
    """A run, whose folder of C sources is built, and beside its program one that runs any network."""
    run = make_run(tmp_path_factory.mktemp("images"), "digits")
    folder = write_c(run)
    build(folder, toolchain)
    shutil.copy(Path(__file__).with_name("run_network.c"), folder)
    toolchain.build(folder, "", [], ["run_network.c"], name="run_network")
    return run


@pytest.mark.slow
def test_images(toolchain, images_run):
    assert main(["export", str(images_run), "--to", "int8"]) == 0
    network = mf.load_int8(images_run / "last-int8.safetensors")
    images = np.random.default_rng(2).normal(size=(3, 1, 28, 28)).astype(np.float32)
    expected = network(torch.from_numpy(images).expand(3, 3, 1, 28, 28)).numpy()
    found = logits_of(images_run / "last-c" / "network", images.tobytes(), runs_with=toolchain.runs_with)
    np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.fixture
def run_network(toolchain, images_run) -> tuple[str | Path, ...]:
    """The command that runs any network."""
    return (*toolchain.runs_with, images_run / "last-c" / "run_network")


@pytest.mark.slow
@pytest.mark.parametrize(("model", "counts", "size"), NETWORKS)
def test_every_compiler_and_processor_gives_the_bits_of_load_int8(
    toolchain, run_network, tmp_path, model, counts, size
):
    path = save(tmp_path / "a.safetensors", random_network(model, counts))
    found = assert_same_bits(run_network, path, random_frames(model, counts, 4, 2, size))
    assert {"portable", *(NEON if toolchain.is_arm else ())} <= found.keys()


@pytest.mark.slow
def test_so_do_lists(run_network, tmp_path):
    model = dataclasses.replace(COUNTS, width=32)
    frames = random_frames(model, True, 3, 1, (8, 6))
    found = [
        assert_same_bits(run_network, save(tmp_path / "a.safetensors", network), frames)
        for network in sparser_networks(random_network(model, True))
    ]
    for isa in found[0].keys() - {"amx"}:  # which has no lists
        assert max(of_network[isa] for of_network in found) > 0, isa


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("cmake"), reason="needs CMake")
def test_its_cmake_project(tmp_path):
    folder = write_c(make_run(tmp_path / "run", "nmnist"), tmp_path / "c")
    subprocess.run(["cmake", "-S", folder, "-B", tmp_path / "build"], check=True, timeout=120)
    subprocess.run(["cmake", "--build", tmp_path / "build"], check=True, timeout=300)
    frame = np.zeros((2, 17, 17), np.float32)
    assert logits_of(tmp_path / "build" / "network", frame.tobytes()).shape == (1, 10)


def test_it_replaces_its_own_files_and_no_others(tmp_path, capsys):
    run, out = make_run(tmp_path / "run", "nmnist"), tmp_path / "c"
    assert write_c(run, out) == write_c(run, out) == out
    assert write_c(run).name == "last-c"
    shutil.copy(run / "last.safetensors", run / "best.safetensors")
    assert write_c(run, which="best").name == "best-c"
    (tmp_path / "project").mkdir()
    (tmp_path / "project" / "README.md").write_text("mine")
    assert main(["export", str(run), "--to", "c", "--out", str(tmp_path / "project")]) == 2
    assert "project holds other files; choose a new folder" in capsys.readouterr().err
    assert (tmp_path / "project" / "README.md").read_text() == "mine"


def test_the_source_includes_no_other_file_of_ours(tmp_path):
    folder = write_c(make_run(tmp_path / "run", "nmnist"), tmp_path / "c")
    own = re.findall(r'#include "(.*)"', (folder / "multifire_engine.cpp").read_text())
    assert own == ["multifire_engine.h"]
    assert "@" not in (folder / "network.h").read_text() + (folder / "main.c").read_text()
