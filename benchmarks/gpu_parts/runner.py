"""Run the items of the parts in order, as far as the time allows; a row that was written is never lost."""

import os
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.gpu_parts import check, epoch, kernels, memory, peers, steps, tune
from benchmarks.gpu_parts.clock import free_memory, synchronize
from benchmarks.gpu_parts.setting import Item, Part, Setting, Table, machine

PARTS: Mapping[str, Part] = {
    "check": Part(check.COLUMNS, check.items),
    "steps": Part(steps.COLUMNS, steps.items),
    "kernels": Part(kernels.COLUMNS, kernels.items),
    "epoch": Part(epoch.COLUMNS, epoch.items),
    "memory": Part(memory.COLUMNS, memory.items),
    "peers": Part(peers.COLUMNS, peers.items),
    "tune": Part(tune.COLUMNS, tune.items),
}
"""Name of a part, and of its file gpu-NAME.csv -> the part, in the order in which they run."""
MAX_MESSAGE = 500
MARGIN = 1.2
"""An item starts only if this many times its estimate is left."""


class Clock:
    """The time that is left, and an estimate of an item's time from those of the items before."""

    def __init__(self, deadline: float):
        self._deadline = deadline  # by time.monotonic()
        self._slowness: dict[tuple[str, float], float] = {}

    @property
    def left(self) -> float:
        return self._deadline - time.monotonic()

    def estimate(self, part: str, item: Item) -> float:
        """Return the seconds that an item may take: its guess, times the factor by which earlier ones were slower.

        Earlier items of the same part and guess are of the same kind; those of another guess only raise the estimate.
        """
        of_part = [factor for (name, _), factor in self._slowness.items() if name == part]
        return item.guess * self._slowness.get((part, item.guess), max([1.0, *of_part]))

    def learn(self, part: str, item: Item, seconds: float) -> None:
        """Compare the seconds that an item took with the guess."""
        key = part, item.guess
        self._slowness[key] = max(self._slowness.get(key, 0.0), seconds / item.guess)


class BrokenDevice(Exception):
    """An error after which the device computes nothing more in this process, such as an illegal memory access."""

    def __init__(self, parts: Sequence[str], done: int):
        """Note the parts that are left, and the number of items of the first one that have run."""
        super().__init__(f"{done} items of {parts[0]} have run")
        self.parts, self.done = parts, done


def run(parts: Sequence[str], setting: Setting, out: Path, deadline: float, done: int = 0) -> None:
    """Run the parts; write a row for each error, and go on.

    Args:
        parts: names of parts.
        setting: the device and sizes.
        out: folder of the CSV files.
        deadline: time.monotonic() at which the process ends.
        done: items of the first part that an earlier process has run; its file is continued.

    Raises:
        BrokenDevice: the device needs a new process.
    """
    clock, constant = Clock(deadline), machine(setting.device)
    now = {"item": "nothing"}
    _end_at(deadline, now)
    print(", ".join(f"{name} {value}" for name, value in constant.items() if value), flush=True)
    for index, name in enumerate(parts):
        table = Table(out / f"gpu-{name}.csv", PARTS[name].columns, constant, append=index == 0 and done > 0)
        for number, item in enumerate(PARTS[name].items(setting)):
            if index == 0 and number < done:
                continue
            estimate = clock.estimate(name, item)
            now["item"] = f"{name}: {item.name}"
            if MARGIN * estimate > clock.left:
                print(f"{now['item']}: skipped, takes about {estimate:.0f} s, {clock.left:.0f} s are left", flush=True)
                continue
            start = time.monotonic()
            _run_item(item, table, setting)
            if is_broken(setting):
                raise BrokenDevice(parts[index:], number + 1)
            clock.learn(name, item, time.monotonic() - start)
            print(f"{now['item']}: {time.monotonic() - start:.1f} s, {clock.left:.0f} s are left", flush=True)
    now["item"] = "nothing"


def _run_item(item: Item, table: Table, setting: Setting) -> None:
    try:
        for row in item.run():
            table.add(row)
            if row.get("error"):
                print(f"  {row['error']}", flush=True)
    except Exception as error:  # one measurement must not end the others
        message = f"{item.name}: {type(error).__name__}: {' '.join(str(error).split())}"[:MAX_MESSAGE]
        print(f"  {message}", flush=True)
        table.add({"error": message})
    if not is_broken(setting):
        free_memory(setting)


def is_broken(setting: Setting) -> bool:
    """Return True if the device answers with an error."""
    try:
        synchronize(setting)
    except RuntimeError:
        return True
    return False


def _end_at(deadline: float, now: Mapping[str, str]) -> None:
    """End the process at the deadline, whatever it is doing then; all rows are on the disk."""

    def end() -> None:
        time.sleep(max(0.0, deadline - time.monotonic()))
        print(f"stopped: the time is over; in progress was {now['item']}", flush=True)
        sys.stdout.flush()
        os._exit(0)

    threading.Thread(target=end, daemon=True).start()
