"""The wheel for 64-bit ARM is cross-built, and its libraries compute under QEMU what those for x86-64 compute."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

from multifire.ops import cpu
from tests.engine.networks import NETWORKS, assert_same_bits, random_frames, random_network, save
from tests.engine.toolchains import QEMU
from tests.test_install import ROOT, copy_sources

CROSS = "aarch64-linux-gnu-"
ENGINE, KERNEL = "multifire/engine/_engine.so", "multifire/ops/_mlf_cpu.so"
OLDEST_GLIBC = (2, 28)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (shutil.which(CROSS + "g++") and shutil.which("cmake")), reason=f"needs {CROSS}g++ and CMake"
    ),
    pytest.mark.skipif(not QEMU, reason="needs qemu-aarch64"),
]


@pytest.fixture(scope="module")
def package(tmp_path_factory) -> Path:
    """Build the wheel as `make wheel-aarch64` does, from a copy; return the folder with its files."""
    folder = tmp_path_factory.mktemp("wheel")
    toolchain = {"MULTIFIRE_PLATFORM": "linux_aarch64", "CMAKE_TOOLCHAIN_FILE": str(ROOT / "cmake" / "aarch64.cmake")}
    build = [sys.executable, "-m", "pip", "--quiet", "wheel", "--no-deps", "--wheel-dir", folder, copy_sources(folder)]
    subprocess.run(build, env=os.environ | toolchain, check=True)
    (wheel,) = folder.glob("*.whl")
    assert wheel.name.endswith("-py3-none-linux_aarch64.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def emulated(program: Path) -> tuple[str | Path, ...]:
    """Return the command that runs a program with the cross compiler's libraries."""
    libc = subprocess.run(
        [CROSS + "gcc", "-print-file-name=libc.so.6"], capture_output=True, text=True, check=True
    ).stdout
    return (str(QEMU), "-L", Path(libc.strip()).resolve().parents[1], program)


def link(compiler: str, source: Path, headers: Path, library: Path, program: Path) -> Path:
    options = ("-O1", "-Wall", "-Wextra", "-Werror", f"-I{headers}")
    subprocess.run([compiler, *options, "-o", program, source, library], check=True)
    return program


@pytest.mark.parametrize("library", [ENGINE, KERNEL])
def test_libraries_need_no_new_system_and_no_openmp_but_gccs(package, library):
    listed = [CROSS + "objdump", "-p", package / library]
    text = subprocess.run(listed, capture_output=True, text=True, check=True).stdout
    assert "elf64-littleaarch64" in text
    versions = [tuple(map(int, version.split("."))) for version in re.findall(r"GLIBC_([0-9.]+)", text)]
    assert max(versions) <= OLDEST_GLIBC
    needed = set(re.findall(r"NEEDED +(\S+)", text))
    assert {name for name in needed if "omp" in name} == ({"libgomp.so.1"} if library == KERNEL else set())


@pytest.mark.parametrize(("model", "counts", "size"), NETWORKS[:4])
def test_its_engine_gives_the_bits_of_load_int8(package, tmp_path, model, counts, size):
    headers, source = package / "multifire" / "engine" / "csrc", Path(__file__).parent / "engine" / "run_network.c"
    program = link(CROSS + "gcc", source, headers, package / ENGINE, tmp_path / "run_network")
    path = save(tmp_path / "a.safetensors", random_network(model, counts))
    frames = random_frames(model, counts, 3, 1, size)
    assert assert_same_bits(emulated(program), path, frames).keys() == {"portable", "neon", "neon_dotprod"}


@pytest.mark.skipif(not (cpu.is_built() and shutil.which("g++")), reason="needs the CPU kernel and g++")
def test_its_cpu_kernel_computes_the_same_as_that_for_x86(package, tmp_path):
    headers, source = package / "multifire" / "ops" / "csrc", Path(__file__).parent / "ops" / "run_kernels.cpp"
    arm = link(CROSS + "g++", source, headers, package / KERNEL, tmp_path / "arm")
    x86 = link("g++", source, headers, cpu.LIBRARY, tmp_path / "x86")
    found, expected = (
        np.frombuffer(subprocess.run([*command, "portable"], capture_output=True, check=True).stdout)
        for command in (emulated(arm), (x86,))
    )
    assert len(expected) > 1e6
    np.testing.assert_array_equal(found, expected)
