"""Install a wheel in a fresh environment without a compiler, and use it: `python tools/try_wheel.py WHEEL`.

First with NumPy alone, which the engine needs, then with all dependencies.
"""

import os
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

CONSTRAINTS = Path(__file__).parents[1] / "constraints.txt"
ENGINE = """
import sys
import numpy as np
import multifire.engine
engine = multifire.engine.load(sys.argv[1])
assert engine.run(np.zeros((4, 2, 1, 28, 28), np.float32)).shape == (2, 10)
assert "torch" not in sys.modules
print("engine without torch:", engine.info)
"""
EXPORT = """
import sys
from pathlib import Path
from multifire.export.int8 import export_run
from multifire.export.shipped import shipped_run
export_run(shipped_run("digits"), Path(sys.argv[1]))
"""
KERNEL = "from multifire.ops import cpu; assert cpu.is_built(); print('CPU kernel: built')"


def main(wheel: Path) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        venv.create(folder / "venv", with_pip=True)
        python = folder / "venv" / "bin" / "python"
        subprocess.run([sys.executable, "-c", EXPORT, folder / "digits.safetensors"], check=True)

        def run(*command: str | Path) -> None:
            """Run a program of the environment in an empty folder, where no compiler is found."""
            environment = {**os.environ, "PATH": str(python.parent), "CC": "none", "CXX": "none"}
            subprocess.run(command, check=True, cwd=folder, env=environment)

        pip = (python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check")
        run(*pip, "numpy")
        run(*pip, "--no-deps", wheel.resolve())
        run(python, "-c", ENGINE, folder / "digits.safetensors")
        run(*pip, "-c", CONSTRAINTS, wheel.resolve())
        run(python, "-c", KERNEL)
        run(python.parent / "multifire", "demo", "--pretrained")
    print("the wheel works in a fresh environment")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
