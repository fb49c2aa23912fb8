"""Builds the CPU kernel (CMakeLists.txt) while the package is built, and goes on without it where that fails.

A hook of hatchling rather than scikit-build-core: an editable install stays one line in a .pth file, so that another
checkout on PYTHONPATH wins over it, and nothing is tried twice where there is no compiler.
"""

import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

LIBRARY = "src/multifire/ops/_mlf_cpu.so"


class BuildKernel(BuildHookInterface):
    def dependencies(self) -> list[str]:
        """CMake from the package index, where the machine has none."""
        return [] if shutil.which("cmake") else ["cmake>=3.20"]

    def initialize(self, version: str, build_data: dict) -> None:
        """Build the library into the source tree, whence both the wheel and an editable install take it."""
        target = Path(self.root) / LIBRARY
        target.unlink(missing_ok=True)
        if sys.platform == "win32":
            return
        try:
            with tempfile.TemporaryDirectory() as folder:
                self._run("cmake", "-S", self.root, "-B", folder, "-DCMAKE_BUILD_TYPE=Release")
                self._run("cmake", "--build", folder, "--parallel", "2")
                shutil.copyfile(Path(folder) / target.name, target)
        except (OSError, subprocess.CalledProcessError) as error:
            self.app.display_warning(f"multifire is installed without its CPU kernel, which did not build: {error}")
            return
        build_data["artifacts"].append(f"/{LIBRARY}")
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{sysconfig.get_platform().replace('-', '_').replace('.', '_')}"

    def _run(self, *command: str) -> None:
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            self.app.display_info(done.stdout + done.stderr)
            done.check_returncode()
