"""Installing the package on a machine without a compiler."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROGRAM = """
import torch, multifire as mf
assert mf.__file__.startswith({folder!r}), mf.__file__
logits = mf.build_model("ds_resnet8", width=2)(torch.rand(2, 1, 3, 8, 8))
logits.sum().backward()
print(mf.ops.backends_used())
"""


@pytest.mark.slow
def test_the_package_works_without_a_compiler(tmp_path):
    no_compiler = {"CC": "/nowhere/cc", "CXX": "/nowhere/c++"}
    pip = [sys.executable, "-m", "pip", "--quiet"]
    build = [*pip, "wheel", "--no-deps", "--wheel-dir", str(tmp_path), str(copy_sources(tmp_path))]
    subprocess.run(build, env=os.environ | no_compiler, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.endswith("-none-any.whl")
    folder = str(tmp_path / "installed")
    subprocess.run([*pip, "install", "--no-deps", "--target", folder, str(wheel)], check=True)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(folder=folder)],
        env=os.environ | {"PYTHONPATH": folder, "MULTIFIRE_BACKEND": "auto"},
        cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["['reference']"]
    assert done.stderr.count("the slow reference computes") == 1


def copy_sources(folder: Path) -> Path:
    """Copy the tracked files, because building writes files beside the sources."""
    copy = folder / "sources"
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True, text=True).stdout
    for name in filter(None, listed.split("\0")):
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_bytes((ROOT / name).read_bytes())
    return copy
