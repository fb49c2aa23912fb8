"""The processes that train together. torchrun starts them, and tells each by environment variables which one it is."""

import contextlib
import itertools
import logging
import os
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from multifire.progress import CONSOLE

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True)
class Processes:
    """This process's place among those that train together."""

    rank: int = 0
    world: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the process that writes files and talks to people."""
        return self.rank == 0

    @property
    def place(self) -> tuple[int, int]:
        return self.rank, self.world

    def total(self, values: "Tensor") -> "Tensor":
        """Σ over processes, in place."""
        if self.world > 1:
            import torch.distributed as dist

            dist.all_reduce(values)
        return values

    def any_of(self, flags: Sequence[bool]) -> list[bool]:
        """For each flag, whether it is set in some process."""
        if self.world == 1:
            return list(flags)
        import torch

        return [count > 0 for count in self.total(torch.tensor(flags, dtype=torch.int32)).tolist()]

    def same(self, value: Any) -> Any:
        """The first process's value, in all of them."""
        if self.world == 1:
            return value
        import torch.distributed as dist

        values = [value]
        dist.broadcast_object_list(values, src=0)
        return values[0]

    def averaging(self, model: "nn.Module", share_buffers: bool) -> "nn.Module":
        """The model, with gradients that are averaged over processes and, with `share_buffers`, the first's buffers."""
        if self.world == 1:
            return model
        from torch.nn.parallel import DistributedDataParallel

        # A 1×1 kernel has strides that say nothing; torch warns that they differ.
        warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # torch 2.13 renames the option; older ones know this name
            return DistributedDataParallel(model, broadcast_buffers=share_buffers)

    def wait(self) -> None:
        """Until every process is here."""
        self.any_of([False])


ALONE = Processes()
_JOINED = itertools.count()
REST_S = 0.2
LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "NCCL", "Timed out waiting")
"""How gloo and NCCL say that another process is gone."""


def device_name(name: str) -> str:
    """The device of this process: where several share a machine with GPUs, one GPU each."""
    if name in ("auto", "cuda") and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        import torch

        if torch.cuda.is_available():
            return f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    return name


def restarted() -> bool:
    """Whether torchrun has started the processes anew, after one of them died."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


@contextlib.contextmanager
def joined() -> Iterator[Processes]:
    """Be one of torchrun's processes, or alone where it started none."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        yield ALONE
        return
    import torch
    import torch.distributed as dist
    from torch.distributed.rendezvous import rendezvous

    store, rank, world = next(rendezvous("env://"))
    # torchrun's store outlives a restart and a run; without a name of its own, a new group would ring at dead doors.
    start, run = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), next(_JOINED)
    store = dist.PrefixStore(f"start {start}, run {run}", store)
    # What is counted lies on the CPU, what is computed where it is computed.
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world)
    processes = Processes(dist.get_rank(), world)
    if not processes.first:
        CONSOLE.quiet = True
        logging.getLogger("multifire").setLevel(logging.ERROR)
    try:
        yield processes
    except RuntimeError as error:
        if not any(sign in str(error) for sign in LOST):
            raise
        raise ConnectionError(f"process {processes.rank} lost the others; the one that failed first says why") from None
    finally:
        # Gloo's thread needs Python's lock to let go of the last tensors; what destroys the group waits for that
        # thread, holding the lock. Without a moment's rest the two wait for each other now and then (torch 2.13).
        time.sleep(REST_S)
        dist.destroy_process_group()
