"""A contestant in a process of its own, which does what it is told over a pipe: so runs of several alternate."""

import contextlib
import ctypes
import multiprocessing
import os
import statistics
import warnings
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol

PROCESSES = multiprocessing.get_context("spawn")


class Asked(Protocol):
    def ask(self, what: str) -> Any: ...


class Worker:
    """A process with the contestant's network; `ask` waits for its answer, `tell` and `answer` do not."""

    def __init__(self, contestant: Any, threads: int, precise: bool = False):
        self._pipe, theirs = PROCESSES.Pipe()
        self._process = PROCESSES.Process(target=_serve, args=(theirs, contestant, threads, precise), daemon=True)
        with _preloading(contestant.preload):
            self._process.start()
        theirs.close()

    def ask(self, what: str) -> Any:
        """What the worker's method `what` returned; "step" and "evaluate" with their seconds in front.

        Raises:
            RuntimeError: the worker failed; says how.
        """
        self._pipe.send(what)
        try:
            problem, value = self._pipe.recv()
        except EOFError:
            self._process.join()
            raise RuntimeError(f"a worker ended with {self._process.exitcode}; it may have run out of memory") from None
        if problem:
            raise RuntimeError(problem)
        return value

    def close(self) -> None:
        with contextlib.suppress(BrokenPipeError, OSError):
            self._pipe.send("end")
        self._process.join(60)
        if self._process.is_alive():
            self._process.kill()


@contextlib.contextmanager
def workers(contestants: Sequence[Any], threads: int, precise: bool = False) -> Iterator[list[Worker]]:
    started = [Worker(contestant, threads, precise) for contestant in contestants]
    try:
        yield started
    finally:
        for worker in started:
            worker.close()


@contextlib.contextmanager
def _preloading(library: str) -> Iterator[None]:
    """A process started meanwhile loads that library first, if any."""
    if not library:
        yield
        return
    os.environ["LD_PRELOAD"] = library
    try:
        yield
    finally:
        del os.environ["LD_PRELOAD"]


def peak_of_steps(contestant: Any, threads: int) -> int:
    """Peak resident bytes of a training step, after a first one, over the interpreter's with all libraries loaded.

    The median of three processes: where malloc leaves gaps is another place in each.
    """

    def of_one_process() -> int:
        with workers([contestant], threads) as (worker,):
            return worker.ask("peak")

    return statistics.median_low([of_one_process() for _ in range(3)])


def _serve(pipe: Connection, contestant: Any, threads: int, precise: bool) -> None:
    os.environ["OMP_NUM_THREADS"] = str(threads)
    warnings.simplefilter("ignore")
    try:
        desk = _Desk(contestant, threads, precise)
    except Exception as error:
        pipe.recv()
        pipe.send((_describe(error), None))
        return
    while (what := pipe.recv()) != "end":
        try:
            pipe.send((None, getattr(desk, what)()))
        except Exception as error:
            pipe.send((_describe(error), None))


def _describe(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"


class _Desk:
    """What a worker can be asked; the network is made at the first question, so that memory before it can be read."""

    def __init__(self, contestant: Any, threads: int, precise: bool):
        import torch

        from multifire.utils.memory import keep_freed_memory

        if contestant.keeps_memory:
            keep_freed_memory(after_first_step=True)
        torch.set_num_threads(threads)
        from benchmarks import contestants

        contestants.load_framework(contestant)
        square = torch.ones(64, 64)
        square.matmul(square)
        self._contestants, self._contestant, self._precise = contestants, contestant, precise
        self._made: Any = None

    @property
    def _player(self) -> Any:
        if self._made is None:
            self._made = self._contestants.make_player(self._contestant, self._precise)
        return self._made

    def step(self) -> tuple[float, float]:
        from multifire.utils.memory import first_step_done

        took = self._contestants.timed(self._player.step)
        first_step_done()  # the floor's steps are none of training's
        return took

    def evaluate(self) -> tuple[float, float]:
        return self._contestants.timed(self._player.evaluate)

    def compare(self) -> dict[str, Any]:
        return {name: tensor.numpy() for name, tensor in self._player.compare().items()}

    def kept(self) -> tuple[int, int]:
        return self._player.kept()

    def moved(self) -> dict[str, tuple]:
        return {name: tuple(moved) for name, moved in self._player.moved().items()}

    def machine(self) -> dict[str, Any]:
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
        from multifire.utils.memory import peak_resident

        before = peak_resident()
        self._player.step()
        _forget_peak()
        for _ in range(2):
            self._player.step()
        return peak_resident() - before


def _forget_peak() -> None:
    """Let VmHWM begin anew, without what a compiler or a first call took; where Linux forbids it, that is counted."""
    ctypes.CDLL(None).malloc_trim(0)
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
