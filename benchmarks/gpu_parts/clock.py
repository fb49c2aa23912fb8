"""Time calls on a device: CUDA events and the host's clock, in turns; on a CPU the host's clock for both."""

import contextlib
import gc
import logging
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from benchmarks.gpu_parts.setting import Setting
from multifire.experiments.bench import capture_graphs
from multifire.utils.log import log

WARM_UP_RUNS = 2
COPY_BYTES = 1 << 30
"""Bytes of the buffer that is copied to measure the bandwidth of a GPU's memory: far more than its caches hold."""


class Measured(NamedTuple):
    """Seconds of a call in each run: on the device, and on the host's clock."""

    device: list[float]
    wall: list[float]


def alternate(calls: Mapping[str, Callable[[], Any]], setting: Setting) -> dict[str, Measured]:
    """Time the calls in turns A B C A B C, after they have captured their graphs."""
    capture_graphs(calls.values())
    measured = {name: Measured([], []) for name in calls}
    for number in range(-WARM_UP_RUNS, setting.runs):
        for name, call in calls.items():
            device_seconds, wall_seconds = time_calls(call, setting)
            if number >= 0:
                measured[name].device.append(device_seconds)
                measured[name].wall.append(wall_seconds)
    return measured


def time_calls(call: Callable[[], Any], setting: Setting) -> tuple[float, float]:
    """Return the seconds of one of `setting.calls` calls in a row, on the device and on the host's clock."""
    synchronize(setting)
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2)] if setting.on_gpu else []
    start = time.perf_counter()
    if events:
        events[0].record()
    for _ in range(setting.calls):
        call()
    if events:
        events[1].record()
    synchronize(setting)
    wall = (time.perf_counter() - start) / setting.calls
    return (1e-3 * events[0].elapsed_time(events[1]) / setting.calls if events else wall), wall


def synchronize(setting: Setting) -> None:
    """Wait until the device has finished."""
    if setting.on_gpu:
        torch.cuda.synchronize(setting.device)


def times(measured: Measured, base: Sequence[float] | None, setting: Setting) -> dict[str, Any]:
    """Return the columns TIMES of a row; `base` are the seconds that the ratio is to, run by run."""
    seconds = measured.device
    ratio = {} if base is None else {"ratio": statistics.median(a / b for a, b in zip(seconds, base, strict=True))}
    return {
        "n": len(seconds),
        "calls": setting.calls,
        "median_s": statistics.median(seconds),
        "fastest_s": min(seconds),
        "slowest_s": max(seconds),
        "wall_s": statistics.median(measured.wall),
        **ratio,
    }


def copier(size: int, setting: Setting) -> Callable[[], Any]:
    """Return a function that copies on the device so that `size` bytes are read and written, together."""
    source = torch.ones(max(1, size // 2), dtype=torch.uint8, device=setting.device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def copy_bandwidth(setting: Setting) -> float:
    """Return the bytes per second, read and written, of a large copy on the device."""
    size = COPY_BYTES if setting.on_gpu else 1 << 22
    copy = {"copy": copier(size, setting)}
    return size / statistics.median(alternate(copy, setting)["copy"].device)


def free_memory(setting: Setting) -> None:
    """Give the memory of deleted tensors and graphs back to the device."""
    gc.collect()
    if setting.on_gpu:
        torch.cuda.empty_cache()


@contextlib.contextmanager
def expect_captures() -> Iterator[None]:
    """Raise a RuntimeError at the end if a capture failed meanwhile, after which a function runs without a graph."""
    failures: list[str] = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if "capture failed" in record.getMessage():
                failures.append(record.getMessage())

    handler = Handler(logging.WARNING)
    log.addHandler(handler)
    try:
        yield
    finally:
        log.removeHandler(handler)
    if failures:
        raise RuntimeError(failures[0])
