"""The public names of the design, and the house rules that a tool can hold."""

import subprocess
import sys
from pathlib import Path

import multifire as mf

ROOT = Path(__file__).parents[1]


def test_public_names():
    for name in mf.__all__:
        assert getattr(mf, name) is not None
    assert mf.ops.mlf
    assert mf.ops.tdbn_mlf
    for name in ("MLF", "TdBatchNorm2d", "DSBlock", "PlainBlock", "SpikingResNet"):
        assert hasattr(mf.nn, name)


def test_import_costs_no_torch():
    program = "import sys, multifire.cli; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_imports_point_one_way():
    done = subprocess.run(
        [Path(sys.executable).parent / "lint-imports", "--no-cache"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
