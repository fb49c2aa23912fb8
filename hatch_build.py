"""Build the CPU kernel and the engine (CMakeLists.txt) into the package; install it without them if that fails.

This is a hook of hatchling. It was preferred to scikit-build-core for two reasons: an editable install is a single line
in a .pth file, so that another checkout on PYTHONPATH takes precedence; and without a compiler the build is tried only
once.
"""

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
        """Build the libraries into the source tree, where both the wheel and an editable install find them."""
        targets = [Path(self.root) / library for library in LIBRARIES]
        for target in targets:
            target.unlink(missing_ok=True)
        if sys.platform == "win32":
            return
        try:
            with tempfile.TemporaryDirectory() as folder:
                self._run("cmake", "-S", self.root, "-B", folder, "-DCMAKE_BUILD_TYPE=Release")
                self._run("cmake", "--build", folder, "--parallel", "2")
                for target in targets:
                    shutil.copyfile(Path(folder) / target.name, target)
        except (OSError, subprocess.CalledProcessError) as error:
            self.app.display_warning(
                f"CPU kernel and engine could not be built, so multifire is installed without them: {error}"
            )
            return
        build_data["artifacts"] += [f"/{library}" for library in LIBRARIES]
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{sysconfig.get_platform().replace('-', '_').replace('.', '_')}"

    def _run(self, *command: str) -> None:
        """Run a command; print its output only if it fails."""
        process = subprocess.run(command, capture_output=True, text=True)
        if process.returncode:
            self.app.display_info(process.stdout + process.stderr)
            process.check_returncode()
