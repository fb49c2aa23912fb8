"""A few cases of the Triton kernel, and properties that only Triton has; without a GPU its interpreter runs them.

All of test_backends.py runs with Triton on a GPU; without a GPU only `make test-slow` does so.
"""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases import Case, assert_close_grads, assert_same_outputs, device_of, fix_block_size, run

from multifire import ops

REASON = ops.triton.why_not(torch.zeros(1, device=device_of("triton")), 1)
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))


@pytest.fixture(autouse=True)
def tensors_on_the_device_of_triton():
    with device_of("triton"):
        yield


@pytest.mark.parametrize(
    "case",
    [
        Case(4, 16, add_after=True),
        Case(1, 1, 8, add_before=True, state=True),
        Case(5, 64, training=False, add_after=True, dtype=torch.bfloat16),
        Case(3, 5, 2, layout="contiguous", add_before=True, add_after=True, state=True),
        Case(2, 17, 5, training=False, add_after=True, affine=False),
        Case(4, 3, static=True, state=True),
        Case(2, 3, 1, layout="contiguous", surrogate="triangle", detach_reset=True),
        Case(2, 100, 3, surrogate="atan", training=False, state=True),
        Case(9, 3, 2, add_before=True, state=True),  # more time steps than the backward pass recomputes at once
    ],
)
def test_case_equals_the_reference(case):
    got, want = run(case, "triton"), run(case, "reference")
    assert_same_outputs(got, want)
    assert_close_grads(got, want, rtol=1e-5 if case.dtype == torch.float32 else 2e-2)


@pytest.mark.parametrize("layout", ["last", "contiguous"])
@pytest.mark.parametrize("shape", range(4))  # of triton_kernels.SHAPES
def test_every_block_size_equals_the_reference(monkeypatch, shape, layout):
    """Autotuning measures how long each block size takes and does not check its results."""
    fix_block_size(monkeypatch, shape)
    case = Case(6, 17, layout=layout, add_before=True, add_after=True, state=True, size=(2, 9, 11))
    got, want = run(case, "triton"), run(case, "reference")
    assert_same_outputs(got, want)
    assert_close_grads(got, want)


def test_every_kernel_compiles_for_gpus():
    """The interpreter accepts code that the compiler refuses, and it does not test the compiler."""
    program = Path(__file__).with_name("gpu_code.py")
    done = subprocess.run([sys.executable, program, "80"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    compiled = {line.split()[0] for line in done.stdout.splitlines()}
    assert compiled == {"stats", "pool_statistics", "forward", "backward", "pool_sums", "finish"}


def test_cpu_without_the_interpreter_is_refused():
    program = (
        "import os; os.environ.pop('TRITON_INTERPRET', None)\n"
        "import torch, multifire as mf\n"
        "try: mf.ops.mlf(torch.zeros(2, 3), backend='triton')\n"
        "except ValueError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "backend 'triton' cannot run here: x lies on cpu, and Triton compiles for GPUs" in done.stdout


def test_auto_does_not_choose_the_interpreter_for_a_cpu_tensor():
    assert ops.choose_backend("auto", torch.zeros(1, device="cpu")) is not ops.triton
