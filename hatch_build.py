"""Build the CPU kernel and the engine (CMakeLists.txt) into the package; install it without them if that fails.

This is a hook of hatchling. It was preferred to scikit-build-core for two reasons: an editable install is a single line
in a .pth file, so that another checkout on PYTHONPATH takes precedence; and without a compiler the build is tried only
once.

MULTIFIRE_PLATFORM (such as linux_aarch64) and CMAKE_TOOLCHAIN_FILE, which CMake reads, build a wheel for another
platform.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

LIBRARIES = ("src/multifire/ops/_mlf_cpu.so", "src/multifire/engine/_engine.so")


class BuildKernel(BuildHookInterface):
    def dependencies(self) -> list[str]:
        """Return the requirement of CMake from the package index if CMake is not installed."""
        return [] if shutil.which("cmake") else ["cmake>=3.20"]

    def initialize(self, version: str, build_data: dict) -> None:
        """Build the libraries into the source tree, where both the wheel and an editable install find them.

        Those of another platform go into build/, so that they do not replace this one's.
        """
        other_platform = os.environ.get("MULTIFIRE_PLATFORM")
        folder = Path(self.root, "build", other_platform) if other_platform else Path(self.root)
        targets = [folder / library for library in LIBRARIES]
        for target in targets:
            target.unlink(missing_ok=True)
        if sys.platform == "win32":
            return
        try:
            self._build(targets)
        except (OSError, subprocess.CalledProcessError) as error:
            if other_platform:
                raise
            self.app.display_warning(
                f"CPU kernel and engine could not be built, so multifire is installed without them: {error}"
            )
            return
        self._add_to_wheel(targets, other_platform, build_data)

    def _add_to_wheel(self, targets: list[Path], other_platform: str | None, build_data: dict) -> None:
        if other_platform:
            names = (library.removeprefix("src/") for library in LIBRARIES)
            build_data["force_include"] |= dict(zip(map(str, targets), names, strict=True))
        else:
            build_data["artifacts"] += [f"/{library}" for library in LIBRARIES]
        platform = other_platform or sysconfig.get_platform().replace("-", "_").replace(".", "_")
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{platform}"

    def _build(self, targets: list[Path]) -> None:
        with tempfile.TemporaryDirectory() as folder:
            self._run("cmake", "-S", self.root, "-B", folder, "-DCMAKE_BUILD_TYPE=Release")
            self._run("cmake", "--build", folder, "--parallel", "2")
            for target in targets:
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(Path(folder) / target.name, target)

    def _run(self, *command: str) -> None:
        """Run a command; print its output only if it fails."""
        process = subprocess.run(command, capture_output=True, text=True)
        if process.returncode:
            self.app.display_info(process.stdout + process.stderr)
            process.check_returncode()
