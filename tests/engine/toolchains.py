"""The compilers of this machine, for it and for 64-bit ARM, whose programs QEMU runs."""

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

QEMU = shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")
WARNINGS = ("-Wall", "-Wextra", "-Werror")


class Toolchain(NamedTuple):
    """A C and a C++ compiler, and the command in front of the programs that they build."""

    name: str
    c: tuple[str, ...]
    cxx: tuple[str, ...]
    runs_with: tuple[str, ...] = ()

    @property
    def is_arm(self) -> bool:
        return bool(self.runs_with)

    def build(self, folder: Path, level: str, cpp: list[str], c: list[str], *, name: str = "network") -> Path:
        """Build a program of the engine in `folder`, with every warning an error; return its path."""
        compile_cpp = [*self.cxx, "-std=c++17", level, "-ffp-contract=off", *WARNINGS, "-c"]
        compile_c = [*self.c, "-std=c99", "-O2", *WARNINGS, "-c"]
        objects = [Path(file).with_suffix(".o").name for file in c]
        for command in (
            *([*compile_cpp, file] for file in cpp),
            *([*compile_c, file] for file in c),  # one by one: ziglang writes no object for the second
            [*self.cxx, "multifire_engine.o", *objects, "-o", name],
        ):
            subprocess.run(command, cwd=folder, check=True, timeout=600)
        return folder / name


def _found() -> list[Toolchain]:
    found = [Toolchain(c, (c,), (cxx,)) for c, cxx in (("gcc", "g++"), ("clang", "clang++")) if shutil.which(cxx)]
    zig = (
        (sys.executable, "-m", "ziglang") if importlib.util.find_spec("ziglang") else None
    )  # clang as a package of Python
    if zig and not shutil.which("clang++"):
        found.append(Toolchain("clang", (*zig, "cc"), (*zig, "c++")))
    if not QEMU:
        return found
    cross = "aarch64-linux-gnu-"
    if shutil.which(cross + "g++"):
        found.append(Toolchain("gcc-aarch64", (cross + "gcc", "-static"), (cross + "g++", "-static"), (QEMU,)))
    if zig:
        target = ("-target", "aarch64-linux-musl")
        found.append(Toolchain("clang-aarch64", (*zig, "cc", *target), (*zig, "c++", *target), (QEMU,)))
    return found


TOOLCHAINS = {toolchain.name: toolchain for toolchain in _found()}
