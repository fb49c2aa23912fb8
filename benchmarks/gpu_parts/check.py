"""Part 1, check: the op against its reference, the repository's tests, and the losses of captured and eager steps."""

import importlib.util
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from types import ModuleType
from typing import Any

import torch

from benchmarks.gpu_parts.bare import ROOT
from benchmarks.gpu_parts.clock import expect_captures, free_memory
from benchmarks.gpu_parts.setting import Item, Setting
from multifire.experiments.bench import Network

COLUMNS = ("kind", "name", "step", "value", "limit", "outcome", "seconds")
TESTS = ("tests/ops/test_triton.py", "tests/nn/test_gpu.py", "tests/training/test_captured.py")
SLOW_TESTS = "not compile and not resumes and not network_learns and not every_kernel"
TEST_SECONDS = 60
BATCHES = 8
"""Batches of random samples that the steps go through again and again."""


def items(setting: Setting) -> list[Item]:
    """Compare the op, run the tests, compare the losses."""
    steps = 100 if setting.on_gpu else 8
    found = [Item("op against its reference", 25 if setting.on_gpu else 12, partial(compare_op, setting))]
    if setting.on_gpu:
        found.append(Item("tests", TEST_SECONDS, run_tests))
    return [*found, Item(f"losses of {steps} steps", 25 if setting.on_gpu else 3, partial(losses, setting, steps))]


def compare_op(setting: Setting) -> Iterator[dict[str, Any]]:
    """Compare `ops.tdbn_mlf` on Triton with the reference: equal outputs for dyadic inputs, gradients within rounding.

    On a CPU, Triton's interpreter computes one case.
    """
    cases = _load_cases()
    for case in _grid(cases, setting):
        start = time.perf_counter()
        limit = 1e-5 if case.dtype == torch.float32 else 2e-2
        outcome = "passed"
        try:
            got, want = cases.run(case, "triton"), cases.run(case, "reference")
            cases.assert_same_outputs(got, want)
            cases.assert_close_grads(got, want, rtol=limit)
        except AssertionError as error:
            outcome = f"failed: {error}".splitlines()[0]
        seconds = time.perf_counter() - start
        yield {"kind": "op", "name": _name(case), "limit": limit, "outcome": outcome, "seconds": seconds}


def _load_cases() -> ModuleType:
    """Import tests/ops/cases.py, which lies in no package."""
    spec = importlib.util.spec_from_file_location("op_cases", ROOT / "tests" / "ops" / "cases.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules["op_cases"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _name(case: Any) -> str:
    """Return what a case changes in the default one."""
    default = type(case)()
    changed = {name: value for name, value in vars(case).items() if value != getattr(default, name)}
    return ", ".join(f"{name} {value}" for name, value in changed.items())


def _grid(cases: ModuleType, setting: Setting) -> list[Any]:
    make, bf16 = cases.Case, torch.bfloat16
    if not setting.on_gpu:
        return [make(2, 3, add_after=True, size=(1, 2, 3))]
    return [
        make(4, 64, add_after=True, size=(8, 32, 32)),
        make(4, 64, add_after=True, dtype=bf16, size=(8, 32, 32)),
        make(4, 64, static=True, dtype=bf16, size=(8, 32, 32)),
        make(4, 256, add_after=True, dtype=bf16, size=(8, 8, 8)),
        make(40, 16, add_after=True, size=(4, 32, 32)),
        make(40, 64, dtype=bf16, size=(4, 8, 8)),
        make(10, 32, add_after=True, size=(4, 42, 42)),
        make(9, 17, 5, add_before=True, add_after=True, state=True, size=(3, 9, 11)),
        make(3, 5, 2, layout="contiguous", add_before=True, add_after=True, state=True),
        make(5, 64, training=False, add_after=True, dtype=bf16),
        make(2, 100, 3, surrogate="atan", training=False, state=True),
        make(2, 3, 1, layout="contiguous", surrogate="triangle", detach_reset=True),
    ]


def run_tests() -> Iterator[dict[str, Any]]:
    """Run some of the repository's tests in a process of their own, for at most TEST_SECONDS."""
    if importlib.util.find_spec("pytest") is None:
        yield {"kind": "tests", "name": " ".join(TESTS), "outcome": "pytest is not installed"}
        return
    command = [sys.executable, "-m", "pytest", "-v", "--continue-on-collection-errors", "-p", "no:cacheprovider"]
    start = time.perf_counter()
    process = subprocess.Popen(
        [*command, "-m", "not slow", "-k", SLOW_TESTS, *TESTS],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    try:
        output, _ = process.communicate(timeout=TEST_SECONDS)
        state = f"exit code {process.returncode}"
    except subprocess.TimeoutExpired:
        process.kill()
        output, _ = process.communicate()
        state = f"stopped after {TEST_SECONDS} s"
    counts = {what: len(re.findall(rf" {what.upper()}\b", output)) for what in ("passed", "failed", "error", "skipped")}
    failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", output, re.MULTILINE)
    told = ", ".join(f"{number} {what}" for what, number in counts.items() if number)
    outcome = "; ".join(filter(None, [state, told, *failed[:5]]))
    print(output[-2000:] if process.returncode else outcome, flush=True)
    yield {
        "kind": "tests", "name": " ".join(TESTS), "outcome": outcome, "seconds": time.perf_counter() - start,
    }  # fmt: skip


def losses(setting: Setting, steps: int) -> Iterator[dict[str, Any]]:
    """Train from one seed on the same batches: twice eagerly and once captured; return the loss of each step.

    The last rows are the largest differences in loss; the difference between the two eager runs is the limit.
    """
    found: dict[str, list[float]] = {}
    for name, captured in {"eager": False, "eager again": False, "captured": True}.items():
        with expect_captures():
            found[name] = _losses_of(setting, steps, captured)
        free_memory(setting)
        yield from ({"kind": "loss", "name": name, "step": i, "value": v} for i, v in enumerate(found[name], 1))
    limit = _largest_difference(found["eager again"], found["eager"])
    yield {"kind": "difference", "name": "eager again - eager", "step": steps, "value": limit}
    value = _largest_difference(found["captured"], found["eager"])
    outcome = "passed" if value <= limit else "larger than between two eager runs"
    yield {
        "kind": "difference", "name": "captured - eager", "step": steps, "value": value, "limit": limit,
        "outcome": outcome,
    }  # fmt: skip


def _losses_of(setting: Setting, steps: int, captured: bool) -> list[float]:
    case = setting.case("cifar10", batch=128)
    batch = case.shape[1]
    x_TNCHW, y = setting.batch(case.with_(batch_size=BATCHES * batch))
    network = Network(case.cfg, setting.device, (x_TNCHW[:, :batch], y[:batch]), captured)
    totals = []
    for step in range(steps):
        samples = slice(step % BATCHES * batch, (step % BATCHES + 1) * batch)
        network.x_TNCHW, network.y = x_TNCHW[:, samples], y[samples]
        totals.append(network.step().clone() / batch)
    return torch.stack(totals).tolist()


def _largest_difference(a: list[float], b: list[float]) -> float:
    return max(abs(x - y) for x, y in zip(a, b, strict=True))
