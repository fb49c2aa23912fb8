"""Run each contestant in a worker process that answers requests over a pipe, so that measured runs can alternate."""

import contextlib
import ctypes
import multiprocessing
import os
import statistics
import warnings
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

PROCESSES = multiprocessing.get_context("spawn")


class Worker:
    """A process that holds the network of a contestant."""

    def __init__(self, contestant: Any, threads: int, use_float64: bool = False):
        self._pipe, worker_end = PROCESSES.Pipe()
        arguments = (worker_end, contestant, threads, use_float64)
        self._process = PROCESSES.Process(target=_serve, args=arguments, daemon=True)
        with _preload(contestant.preload):
            self._process.start()
        worker_end.close()

    def ask(self, what: str) -> Any:
        """Call the method `what` of `_Requests` in the worker, wait, and return its result.

        Raises:
            RuntimeError: the call failed, or the worker ended.
        """
        self._pipe.send(what)
        try:
            problem, value = self._pipe.recv()
        except EOFError:
            self._process.join()
            raise RuntimeError(
                f"a worker ended with exit code {self._process.exitcode}; it may have run out of memory"
            ) from None
        if problem:
            raise RuntimeError(problem)
        return value

    def close(self) -> None:
        """Ask the worker to end; kill it if it does not end within a minute."""
        with contextlib.suppress(BrokenPipeError, OSError):
            self._pipe.send("end")
        self._process.join(60)
        if self._process.is_alive():
            self._process.kill()


@contextlib.contextmanager
def workers(contestants: Sequence[Any], threads: int, use_float64: bool = False) -> Iterator[list[Worker]]:
    """Start a worker for each contestant, and end all workers when the context ends."""
    started = [Worker(contestant, threads, use_float64) for contestant in contestants]
    try:
        yield started
    finally:
        for worker in started:
            worker.close()


@contextlib.contextmanager
def _preload(library: str) -> Iterator[None]:
    """Let a process that is started within the context load this library before all others; "" changes nothing."""
    if not library:
        yield
        return
    before = os.environ.get("LD_PRELOAD", "")
    os.environ["LD_PRELOAD"] = f"{library} {before}"
    try:
        yield
    finally:
        os.environ["LD_PRELOAD"] = before


def peak_of_steps(contestant: Any, threads: int) -> int:
    """Return the peak memory of a training step in bytes: the median of three processes.

    See `_Requests.peak`. Each process gives another value, because malloc leaves its gaps at other addresses.
    """

    def measure_one_process() -> int:
        with workers([contestant], threads) as (worker,):
            return worker.ask("peak")

    return statistics.median_low([measure_one_process() for _ in range(3)])


def _serve(pipe: Connection, contestant: Any, threads: int, use_float64: bool) -> None:
    """Answer requests with (error message or None, result) until the request "end" comes."""
    os.environ["OMP_NUM_THREADS"] = str(threads)
    warnings.simplefilter("ignore")
    try:
        requests = _Requests(contestant, threads, use_float64)
    except Exception as error:
        pipe.recv()
        pipe.send((_describe(error), None))
        return
    while (what := pipe.recv()) != "end":
        try:
            pipe.send((None, getattr(requests, what)()))
        except Exception as error:
            pipe.send((_describe(error), None))


def _describe(error: Exception) -> str:
    """Return the type and message of an error in one line of limited length."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"


class _Requests:
    """The requests that a worker answers: each public method is one.

    The first request that needs the network builds it, so that `peak` can read the memory before.
    """

    def __init__(self, contestant: Any, threads: int, use_float64: bool):
        import torch

        from multifire.utils.memory import keep_freed_memory

        if contestant.keeps_memory:
            keep_freed_memory(after_first_step=True)
        torch.set_num_threads(threads)
        from benchmarks import contestants

        contestants.load_framework(contestant)
        matrix = torch.ones(64, 64)
        matrix.matmul(matrix)  # the first product initialises the library of linear algebra
        self._contestants, self._contestant, self._use_float64 = contestants, contestant, use_float64
        self._built_player: Any = None

    @property
    def _player(self) -> Any:
        if self._built_player is None:
            self._built_player = self._contestants.make_player(self._contestant, self._use_float64)
        return self._built_player

    def step(self) -> tuple[float, float]:
        """Do one training step; return its seconds and its loss."""
        from multifire.utils.memory import first_step_done

        seconds_and_loss = self._contestants.timed(self._player.step)
        first_step_done()  # train_step calls it too, but the floor does not use train_step
        return seconds_and_loss

    def evaluate(self) -> tuple[float, float]:
        """Do one forward pass in evaluation mode; return its seconds and the largest logit."""
        return self._contestants.timed(self._player.evaluate)

    def compare(self) -> dict[str, Any]:
        """Return logits and gradients as NumPy arrays; see `Player.compare`."""
        return {name: tensor.numpy() for name, tensor in self._player.compare().items()}

    def kept(self) -> tuple[int, int]:
        """Return the bytes that autograd keeps, and the number of neuron-steps; see `Player.kept`."""
        return self._player.kept()

    def moved(self) -> dict[str, tuple]:
        """Return the fractions of spikes that differ because of bf16, by layer; see `Player.moved`."""
        return {name: tuple(moved) for name, moved in self._player.moved().items()}

    def machine(self) -> dict[str, Any]:
        """Return the processor, the number of threads, the CPU kernel and the versions of the software."""
        import torch

        from multifire import ops
        from multifire.utils.device import describe_machine

        backend = ops.choose_backend("auto", torch.zeros(1)).__name__.rpartition(".")[2]
        return describe_machine(torch.device("cpu")) | {
            "framework": self._contestant.framework_version(),
            "kernel": ops.cpu.isa() if backend == "cpu" else "none",
            "bf16": torch.ops.mkldnn._is_mkldnn_bf16_supported(),
        }

    def peak(self) -> int:
        """Return the peak resident memory of two training steps in bytes.

        A first step, which is not measured, comes before them. The memory of the interpreter and of the loaded
        libraries is subtracted.
        """
        from multifire.utils.memory import peak_resident

        before = peak_resident()
        self._player.step()
        _reset_peak()
        for _ in range(2):
            self._player.step()
        return peak_resident() - before


def _reset_peak() -> None:
    """Reset VmHWM, so that the peak excludes compilation and the first call.

    If Linux does not permit the reset, the peak includes them.
    """
    ctypes.CDLL(None).malloc_trim(0)
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
