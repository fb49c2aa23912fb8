"""The CPU kernel: instruction sets, threads, choice of the backend, memory errors, and a missing build."""

import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from cases import Case, assert_close_grads, assert_same_outputs, run
from torch.utils._python_dispatch import TorchDispatchMode

from multifire import ops
from multifire.ops import cpu

pytestmark = pytest.mark.skipif(not cpu.is_built(), reason=cpu.NOT_BUILT)

SOURCES = Path(cpu.__file__).parent / "csrc"


@pytest.fixture(params=["avx512_bf16", "avx512", "avx2", "portable"])
def each_isa(request):
    before = cpu.isa()
    try:
        cpu.use_isa(request.param)
    except ValueError as error:
        pytest.skip(str(error))
    yield request.param
    cpu.use_isa(before)


@pytest.mark.usefixtures("each_isa")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", ["last", "contiguous"])
@pytest.mark.parametrize("levels", [1, 2, 3, 5])
def test_every_instruction_set_equals_the_reference(levels, layout, dtype):
    options = {"add_before": True, "add_after": True, "state": True, "dtype": dtype}
    for case in (
        Case(5, 17, levels, layout, **options),
        Case(5, 17, levels, layout, training=False, **options),
        Case(5, 17, levels, layout, affine=False, surrogate="triangle", static=True, **options),
        Case(5, 17, levels, layout, surrogate="atan", detach_reset=True, **options),
    ):
        got, want = run(case, "cpu"), run(case, "reference")
        assert_same_outputs(got, want)
        assert_close_grads(got, want, rtol=1e-5 if dtype == torch.float32 else 2e-2)


@pytest.mark.usefixtures("each_isa")
@pytest.mark.parametrize("surrogate", ["rect", "triangle", "atan", "sigmoid", "gaussian"])
@pytest.mark.parametrize("levels", [1, 2, 3, 5])
@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize(
    ("membranes", "reset"), [("own", "zero"), ("own", "subtract"), ("shared", "any"), ("shared", "subtract")]
)
def test_every_member_equals_the_reference_on_every_instruction_set(membranes, reset, signed, levels, surrogate):
    member = {"membranes": membranes, "reset": reset, "signed": signed, "surrogate": surrogate}
    for case in (
        Case(5, 17, levels, add_before=True, add_after=True, state=True, learned=True, **member),
        Case(3, 5, levels, "contiguous", training=False, static=True, detach_reset=True, learned=True, **member),
    ):
        got, want = run(case, "cpu"), run(case, "reference")
        assert_same_outputs(got, want)
        assert_close_grads(got, want)


@pytest.mark.usefixtures("each_isa")
@pytest.mark.parametrize("surrogate", ["sigmoid", "gaussian"])
@pytest.mark.parametrize("width", [0.01, 1.0, 30.0])
def test_exponentials_are_as_exact_as_their_arguments(surrogate, width):
    """Also far from the threshold, where e^-86 and less become 0, and at NaN."""
    v = torch.cat([torch.linspace(-40, 40, 20_001) * width, torch.tensor([0.0, 1e30, -1e30, torch.nan])])
    grads = []
    for backend in ("cpu", "reference"):
        leaf = v[None].clone().requires_grad_()
        ops.mlf(leaf, (0.0,), surrogate=surrogate, width=width, backend=backend)[0].sum().backward()
        grads.append(leaf.grad[0])
    tolerance = 3e-6 if surrogate == "sigmoid" else 3e-5  # e^-x has x times the error of x, which a square rounds twice
    torch.testing.assert_close(*grads, rtol=tolerance, atol=1e-35 / width, equal_nan=True)


def test_unknown_instruction_set_is_refused():
    with pytest.raises(ValueError, match="no build of the CPU kernel for 'sse9' runs here"):
        cpu.use_isa("sse9")


@pytest.mark.parametrize("layout", ["last", "contiguous"])
def test_results_do_not_depend_on_the_number_of_threads(layout):
    before = torch.get_num_threads()
    case = Case(4, 17, layout=layout, size=(4, 40, 40), add_before=True, state=True)
    results = []
    try:
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            results.append(run(case, "cpu"))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert_same_outputs(other, results[0])
        for name, grad in results[0].grads.items():
            assert torch.equal(other.grads[name], grad), name


class OpRecorder(TorchDispatchMode):
    """Records which ops of multifire are called."""

    def __init__(self):
        super().__init__()
        self.called: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "multifire":
            self.called.append(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("training", [True, False])
def test_dispatch_mode_sees_the_ops_and_does_not_change_the_results(training):
    case = Case(4, 17, 3, training=training, add_before=True, add_after=True, state=True)
    direct = run(case, "cpu")
    with OpRecorder() as recorder:
        recorded = run(case, "cpu")
    assert recorder.called == ["multifire::tdbn_mlf_cpu", "multifire::tdbn_mlf_cpu_backward"]
    assert_same_outputs(direct, recorded)
    for name, grad in recorded.grads.items():
        assert torch.equal(direct.grads[name], grad), name


class RecordingTensor(torch.Tensor):
    """A tensor subclass that records which functions are called with it."""

    called: ClassVar[list[str]] = []

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        cls.called.append(str(func))
        return super().__torch_function__(func, types, args, kwargs or {})


@pytest.mark.parametrize("name", ["x", "weight", "add_after"])
def test_tensor_subclass_sees_the_op(name):
    tensors = {"x": torch.rand(2, 3, 5, 4, 4), "weight": torch.rand(5), "add_after": torch.ones(2, 3, 5, 4, 4)}
    rest = {"bias": None, "running_mean": torch.zeros(5), "running_var": torch.ones(5), "training": False}
    want, _ = ops.tdbn_mlf(**tensors, **rest, backend="cpu")
    tensors[name] = tensors[name].as_subclass(RecordingTensor)
    RecordingTensor.called.clear()
    got, _ = ops.tdbn_mlf(**tensors, **rest, backend="cpu")
    assert "multifire.tdbn_mlf_cpu.default" in RecordingTensor.called
    assert torch.equal(got, want)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ["weight", "bias", "running_mean", "running_var", "add_before", "add_after", "state"])
def test_tensor_on_another_device_is_refused(name, training):
    tensors = {key: torch.ones(5) for key in ("weight", "bias", "running_mean", "running_var")}
    tensors |= {key: torch.ones(2, 3, 5, 4, 4) for key in ("add_before", "add_after")}
    tensors["state"] = torch.ones(3, 3, 5, 4, 4)
    tensors[name] = tensors[name].to("meta")
    with pytest.raises((ValueError, RuntimeError), match="meta"):
        ops.tdbn_mlf(torch.ones(2, 3, 5, 4, 4), **tensors, training=training, backend="cpu")


@pytest.mark.parametrize("momentum", [0.1, 0.75])
@pytest.mark.parametrize("stride", [1, 2])
def test_running_statistics_equal_the_reference_and_their_versions_increase(stride, momentum):
    x = torch.randn(3, 4, 17, 5, 5)
    updated = {}
    for backend in ("cpu", "reference"):
        mean, var = (torch.linspace(low, 2, 17 * stride)[::stride] for low in (-1, 0.5))
        ops.tdbn_mlf(x, None, None, mean, var, training=True, momentum=momentum, backend=backend)
        assert mean._version > 0
        assert var._version > 0
        updated[backend] = mean, var
    torch.testing.assert_close(updated["cpu"], updated["reference"], rtol=1e-6, atol=1e-7)


def test_auto_chooses_the_kernel_and_logs_it_once(caplog, monkeypatch):
    monkeypatch.setattr(ops, "_used", {})
    monkeypatch.delenv("MULTIFIRE_BACKEND", raising=False)
    with caplog.at_level(logging.INFO, "multifire"):
        ops.mlf(torch.zeros(2, 3))
        ops.mlf(torch.zeros(2, 3))
    assert caplog.messages == ["neurons run on the cpu backend"]
    assert ops.backends_used() == ["cpu"]


def test_environment_variable_overrides_auto(monkeypatch):
    monkeypatch.setattr(ops, "_used", {})
    monkeypatch.setenv("MULTIFIRE_BACKEND", "reference")
    ops.mlf(torch.zeros(2, 3))
    ops.mlf(torch.zeros(2, 3), backend="cpu")
    assert ops.backends_used() == ["reference", "cpu"]


def test_missing_library_falls_back_to_the_reference_with_one_warning(caplog, monkeypatch):
    monkeypatch.setattr(ops, "_used", {})
    monkeypatch.setattr(cpu, "_LIBRARY", None)
    monkeypatch.delitem(ops.BACKENDS, "triton", raising=False)  # Triton's interpreter is available in the tests
    with caplog.at_level(logging.WARNING, "multifire"):
        ops.mlf(torch.zeros(2, 3))
        ops.mlf(torch.zeros(2, 3))
    assert len(caplog.messages) == 1
    assert "the slow reference computes" in caplog.messages[0]
    with pytest.raises(ValueError, match="backend 'cpu' cannot run here: it was not built"):
        ops.mlf(torch.zeros(2, 3), backend="cpu")


def test_kernel_shares_the_thread_pool_of_torch():
    """The waiting threads of two OpenMP runtimes in one process would take processor time from each other."""
    if not Path("/proc/self/maps").exists():
        pytest.skip("needs /proc")
    files = {Path(line.split()[-1]) for line in Path("/proc/self/maps").read_text().splitlines() if "/" in line}
    assert cpu.LIBRARY in files  # so that its runtime is loaded too
    runtimes = [str(file) for file in files if file.name.startswith(("libgomp", "libomp", "libiomp"))]
    if not runtimes:
        pytest.skip("no OpenMP runtime is loaded: torch and the kernel were built without OpenMP")
    assert len(runtimes) == 1, runtimes


@pytest.mark.slow
def test_address_sanitizer_finds_no_memory_error(tmp_path):
    """Run the tests of unusual shapes again, on a build with -fsanitize=address."""
    compiler = shutil.which("g++")
    if compiler is None or sys.platform != "linux":
        pytest.skip("needs g++ on Linux")
    library = tmp_path / "_mlf_cpu.so"
    builds = {
        "portable": ["-DMULTIFIRE_LANES=4"],
        "avx2": ["-DMULTIFIRE_LANES=8", "-mavx2", "-mfma"],
        "avx512_bf16": ["-DMULTIFIRE_LANES=16", "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512bf16"],
        "avx512": ["-DMULTIFIRE_LANES=16", "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"],
    }
    flags = ["-std=c++17", "-O1", "-g", "-fPIC", "-fopenmp", "-Wno-psabi", "-ffp-contract=off", "-fsanitize=address"]
    objects = []
    for isa, options in builds.items():
        objects.append(str(tmp_path / f"{isa}.o"))
        command = [
            compiler,
            *flags,
            f"-DMULTIFIRE_ISA={isa}",
            *options,
            "-c",
            str(SOURCES / "kernels.cpp"),
            "-o",
            objects[-1],
        ]
        subprocess.run(command, check=True)
    command = [
        compiler,
        *flags,
        "-DMULTIFIRE_X86",
        "-shared",
        str(SOURCES / "dispatch.cpp"),
        *objects,
        "-o",
        str(library),
    ]
    subprocess.run(command, check=True)
    runtime = subprocess.run(
        [compiler, "-print-file-name=libasan.so"], check=True, capture_output=True, text=True
    ).stdout.strip()
    tests = Path(__file__)
    names = (
        "test_sizes", "test_shapes", "test_static_input", "test_mlf_equals_the_reference", "test_mlf_in_channels_last",
        "instruction_set", "test_state_over", "test_surrogates", "test_norm", "test_members", "unusual_sizes",
    )  # fmt: skip
    selection = f"({' or '.join(names)}) and not triton"
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-x",
            "-p",
            "no:cacheprovider",
            "-k",
            selection,
            str(tests.with_name("test_backends.py")),
            str(tests.with_name("test_family.py")),
            str(tests),
        ],
        cwd=tests.parents[2],
        env={**os.environ, "LD_PRELOAD": runtime, "ASAN_OPTIONS": "detect_leaks=0", "MULTIFIRE_LIBRARY": str(library)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "passed" in done.stdout
