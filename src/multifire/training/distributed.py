"""Train with several processes. torchrun starts them and numbers them through environment variables."""

import contextlib
import itertools
import logging
import os
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from multifire.utils.log import log
from multifire.utils.progress import CONSOLE

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True)
class Processes:
    """The number of this process, and the number of processes that train together."""

    rank: int = 0
    world: int = 1

    @property
    def is_first(self) -> bool:
        """True for the process that writes files and prints."""
        return self.rank == 0

    @property
    def rank_and_world(self) -> tuple[int, int]:
        """The number of this process and the number of processes."""
        return self.rank, self.world

    def total(self, values: "Tensor") -> "Tensor":
        """Sum a tensor over all processes in place, and return it."""
        if self.world > 1:
            import torch.distributed as dist

            dist.all_reduce(values)
        return values

    def any_of(self, flags: Sequence[bool]) -> list[bool]:
        """Return for each flag True if it is set in at least one process."""
        if self.world == 1:
            return list(flags)
        import torch

        return [count > 0 for count in self.total(torch.tensor(flags, dtype=torch.int32)).tolist()]

    def same(self, value: Any) -> Any:
        """Return the value of the first process, in all processes."""
        if self.world == 1:
            return value
        import torch.distributed as dist

        values = [value]
        dist.broadcast_object_list(values, src=0)
        return values[0]

    def wrap(self, model: "nn.Module", share_buffers: bool) -> "nn.Module":
        """Return the model or, with several processes, a wrapper that averages its gradients over them.

        With `share_buffers`, all processes use the buffers of the first one.
        """
        if self.world == 1:
            return model
        from torch.nn.parallel import DistributedDataParallel

        # torch warns that the strides of 1×1 kernels differ, but they have no effect there.
        warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # torch 2.13 renames the option; older ones know this name
            return DistributedDataParallel(model, broadcast_buffers=share_buffers)

    def wait(self) -> None:
        """Wait until every process has called this."""
        self.any_of([False])


ALONE = Processes()
_JOIN_COUNT = itertools.count()
SHUTDOWN_DELAY_S = 0.2
LOST_PEER = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "NCCL", "Timed out waiting")
"""Parts of the messages of gloo and NCCL about a process that has died."""


def device_name(name: str) -> str:
    """Return the name of this process's device: several processes on a machine with GPUs use one GPU each."""
    if name in ("auto", "cuda") and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        import torch

        if torch.cuda.is_available():
            return f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    return name


def was_restarted() -> bool:
    """Return True if torchrun has restarted the processes after one of them died."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


@contextlib.contextmanager
def process_group() -> Iterator[Processes]:
    """Join the process group that torchrun has set up; without torchrun, return `ALONE`.

    Raises:
        ConnectionError: another process has died.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        yield ALONE
        return
    import torch
    import torch.distributed as dist
    from torch.distributed.rendezvous import rendezvous

    store, rank, world = next(rendezvous("env://"))
    # torchrun's store outlives a restart and a run: without its own prefix, a new group would read old addresses.
    start, run = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), next(_JOIN_COUNT)
    store = dist.PrefixStore(f"start {start}, run {run}", store)
    # Counts are summed on the CPU, gradients on the device.
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world)
    processes = Processes(dist.get_rank(), world)
    if not processes.is_first:
        CONSOLE.quiet = True
        log.setLevel(logging.ERROR)
    try:
        yield processes
    except RuntimeError as error:
        if not any(message in str(error) for message in LOST_PEER):
            raise
        raise ConnectionError(
            f"process {processes.rank} lost its connection to the others; see the message of the one that failed first"
        ) from None
    finally:
        # Gloo's thread needs the GIL to release the last tensors, and destroy_process_group waits for that thread while
        # it holds the GIL. Without this delay the two sometimes deadlock (torch 2.13).
        time.sleep(SHUTDOWN_DELAY_S)
        dist.destroy_process_group()
