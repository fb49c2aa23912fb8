#!/usr/bin/env python3
"""Test what opens a stranger's file with damaged files (fuzzing): checkpoints, exports, configurations, runs, packets.

usage: tools/fuzz_loaders.py LOADER... [--runs N] [--seed N]

LOADER is one or more of: checkpoint, reference, int8, onnx, nir, config, metrics, run, udp, pickle, or all.

Valid files are damaged at random: bytes change, are cut out, repeated or exchanged between files, numbers become
extreme ones. Digests are not checked here, so that damage reaches what lies behind the check. A failure is one of:

- an exception other than ValueError or FileNotFoundError;
- more than one second of computing time;
- more resident memory than 10 × the size of the file plus 64 MB;
- a program, a connection or a module that was started, opened or imported, or Python code that was run.

Each different failure is written to ./crash-LOADER-NUMBER once, and the run goes on. It ends with exit code 1 if there
were any.
"""

import argparse
import contextlib
import gc
import itertools
import logging
import pickle
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from fuzz_limits import in_batches  # pyright: ignore[reportMissingImports] - beside this file

import multifire as mf
from multifire.config import RunConfig, json_format
from multifire.datasets import images
from multifire.events.live import packed_records
from multifire.events.recording import EVENT_DTYPE
from multifire.export import inspection, nir, onnx_digest
from multifire.report.page import Report, page
from multifire.report.run_files import RunFiles
from multifire.training.checkpoint import load_model
from multifire.utils import tensor_files

MAX_SECONDS = 1.0
CHUNK = 2000
"""Inputs between two garbage collections."""
SCRATCH = Path(tempfile.mkdtemp(prefix="multifire-fuzz-", dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
FORBIDDEN = ("os.system", "subprocess.Popen", "os.exec", "os.posix_spawn", "os.fork", "socket.connect",
             "pickle.find_class", "exec", "import", "ctypes.dlopen")  # fmt: skip
"""Events of Python's audit hooks that no loader may cause once it has read a valid file."""
NUMBERS = (b"-1", b"0", b"1e308", b"NaN", b"Infinity", b"null", b"true", b'"x"', b"[]", b"{}", b"99999999999999999999",
           b"1000000", b"65536", b"[[[[[[[[1]]]]]]]]")  # fmt: skip
WORDS = (0, 1, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 0x10000000, 1 << 40)


class Loader(NamedTuple):
    """What reads a file."""

    seeds: Callable[[Path], list[bytes]]
    """Returns valid files; the argument is the folder of a small run."""
    load: Callable[[bytes], Any]


def in_file(name: str, load: Callable[[Path], Any]) -> Callable[[bytes], Any]:
    """Return a function of a file's content that writes it to the file `name` and loads it."""

    def load_content(data: bytes) -> Any:
        path = SCRATCH / name
        path.write_bytes(data)
        return load(path)

    return load_content


# The loaders


def checkpoint_seeds(run: Path) -> list[bytes]:
    return [(run / "last.safetensors").read_bytes(), (run / "best.safetensors").read_bytes()]


def reference_seeds(run: Path) -> list[bytes]:
    model, _ = load_model(run / "last.safetensors")
    state = mf.to_reference_state_dict(model)
    files = []
    for content in ({"model": state, "epoch": 3}, state, {"model": {"stem.weight": Evil()}}):
        torch.save(content, SCRATCH / "seed.pth")
        files.append((SCRATCH / "seed.pth").read_bytes())
    return files


class Evil:
    """An object whose unpickling runs code."""

    def __reduce__(self):
        return (print, ("code from a file ran",))


def int8_seeds(run: Path) -> list[bytes]:
    from multifire.export.int8 import export_run

    export_run(run)
    return [next(run.glob("*int8*.safetensors")).read_bytes()]


def onnx_seeds(run: Path) -> list[bytes]:
    return [exported(run, "onnx")]


def nir_seeds(run: Path) -> list[bytes]:
    return [exported(run, "nir")]


def exported(run: Path, to: str) -> bytes:
    from multifire.export.export_run import write_run

    return write_run(run, to, run / f"seed.{to}").read_bytes()


def config_seeds(run: Path) -> list[bytes]:
    return [(run / "config.json").read_bytes(), json_format.to_json(mf.recipe("dvs-gesture")).encode()]


def load_config(data: bytes) -> RunConfig:
    return json_format.from_json(data.decode("utf-8", "replace"), "config.json")


def metrics_seeds(run: Path) -> list[bytes]:
    return [(run / "metrics.jsonl").read_bytes()]


def run_seeds(run: Path) -> list[bytes]:
    names = ("config.json", "metrics.jsonl", "summary.json", "analysis.json", "analysis.jsonl")
    return [b"\0".join(name.encode() + b"\1" + (run / name).read_bytes() for name in names if (run / name).is_file())]


loads = itertools.count()


def load_run_folder(data: bytes) -> RunFiles:
    """Read a run's folder, whose files stand one after the other; every 50th becomes a report."""
    folder = SCRATCH / "run"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for part in data.split(b"\0"):
        name, _, content = part.partition(b"\1")
        if name.replace(b".", b"").replace(b"-", b"").isalnum() and len(name) < 40:
            (folder / name.decode("ascii", "replace")).write_bytes(content)
    files = RunFiles(folder)
    if next(loads) % 50 == 0:
        page(Report([files], [], []))
    return files


def load_metrics(data: bytes) -> RunFiles:
    return load_run_folder(b"metrics.jsonl\1" + data.replace(b"\0", b""))


def udp_seeds(run: Path) -> list[bytes]:
    events = np.zeros(20, EVENT_DTYPE)
    events["t"], events["x"], events["y"], events["p"] = np.arange(20), 5, np.arange(20), np.arange(20) % 2
    return [events.tobytes(), events[:1].tobytes()]


def pickle_seeds(run: Path) -> list[bytes]:
    rng = np.random.default_rng(0)
    content = {b"labels": rng.integers(0, 10, 3).tolist(), b"data": rng.integers(0, 256, (3, 3072)).astype("u1")}
    good = [pickle.dumps(content, protocol=protocol) for protocol in range(5)]
    return [*good, pickle.dumps({b"labels": [0], b"data": Evil()}, protocol=2)]


def load_batches(data: bytes) -> Any:
    """Read a batch of CIFAR-10's Python version."""
    return images.read_python_batch(data, "data_batch_1", 10)


LOADERS = {
    "checkpoint": Loader(checkpoint_seeds, in_file("a.safetensors", load_model)),
    "reference": Loader(reference_seeds, in_file("a.pth", mf.load_reference_checkpoint)),
    "int8": Loader(int8_seeds, in_file("a.safetensors", mf.load_int8)),
    "onnx": Loader(onnx_seeds, in_file("a.onnx", inspection.inspect)),
    "nir": Loader(nir_seeds, in_file("a.nir", inspection.inspect)),
    "config": Loader(config_seeds, load_config),
    "metrics": Loader(metrics_seeds, load_metrics),
    "run": Loader(run_seeds, load_run_folder),
    "udp": Loader(udp_seeds, lambda data: packed_records(data, (34, 34), "UDP packet")),
    "pickle": Loader(pickle_seeds, load_batches),
}


def ignore_digests(seeds: list[bytes]) -> None:
    """Let every digest match: the stored one is that of the first seed."""
    stored = {}
    if b'"digest":"' in seeds[0][:100_000]:
        stored["tensors"] = seeds[0].partition(b'"digest":"')[2][:64].decode()
    tensor_files._digest = lambda *_: stored.get("tensors", "")
    onnx_digest._tail = lambda _: seeds[0][-onnx_digest._TAIL :]
    nir._digest = Anything()  # pyright: ignore[reportAttributeAccessIssue]


class Anything:
    """A digest that equals any text."""

    def __call__(self, *_: Any) -> "Anything":
        return self

    def __eq__(self, other: object) -> bool:
        return isinstance(other, str)

    def __hash__(self) -> int:
        return 0


# Damage


def damage(seeds: list[bytes], rng: np.random.Generator) -> bytes:
    """Return a seed with random changes; in most safetensors files only the header changes, and its length fits."""
    seed = seeds[rng.integers(len(seeds))]
    length = int.from_bytes(seed[:8], "little")
    if seed[8:9] != b"{" or length > len(seed) or rng.random() < 0.2:
        return change(seed, seeds, rng)
    head = change(seed[8 : 8 + length].rstrip(), [seed[8 : 8 + length]], rng)
    head += b" " * (-len(head) % 8)
    return len(head).to_bytes(8, "little") + head + seed[8 + length :]


def change(seed: bytes, seeds: list[bytes], rng: np.random.Generator) -> bytes:
    """Return the bytes with one to four random changes, which occur more often near the ends."""
    changed = bytearray(seed)
    for _ in range(rng.integers(1, 5)):
        at = int(len(changed) * rng.random() ** rng.choice([1, 1, 5]))
        at = max(len(changed) - at, 0) if rng.random() < 0.2 else at
        length = int(rng.integers(1, 200))
        match rng.integers(10):
            case 0:
                del changed[at : at + length]
            case 1:
                changed[at:at] = changed[at : at + length] * int(rng.integers(1, 4))
            case 2:
                del changed[max(at, 8) :]
            case 3:
                size = int(rng.choice([2, 4, 8]))
                word = int(rng.choice(np.array(WORDS, np.uint64))) % (1 << (8 * size))
                changed[at : at + size] = word.to_bytes(size, "little")
            case 4:
                other = seeds[rng.integers(len(seeds))]
                changed[at : at + length] = other[at : at + length]
            case 5 | 6 | 7:
                replace_number(changed, at, rng)
            case _:
                changed[at : at + 1] = bytes([rng.integers(256)])
    return bytes(changed)


def replace_number(changed: bytearray, at: int, rng: np.random.Generator) -> None:
    """Replace the next number in a text by an extreme value."""
    start = at
    while start < len(changed) and not 48 <= changed[start] <= 57:
        start += 1
    end = start
    while end < len(changed) and (48 <= changed[end] <= 57 or changed[end] in b".e-"):
        end += 1
    changed[start:end] = NUMBERS[rng.integers(len(NUMBERS))]


# Limits


seen_events: list[str] = []
watching = False


def watch(event: str, args: tuple[Any, ...]) -> None:
    if not watching or event not in FORBIDDEN:
        return
    if event == "import" and args[0].partition(".")[0] in sys.modules:
        return  # torch imports some of its own modules when a file first needs them
    if event == "exec" and str(getattr(args[0], "co_filename", "")).startswith(sys.prefix):
        return
    seen_events.append(f"{event} {str(args[:1])[:80]}")


@contextlib.contextmanager
def watched() -> Iterator[None]:
    global watching
    seen_events.clear()
    watching = True
    try:
        yield
    finally:
        watching = False


def check(loader: Loader, data: bytes) -> str:
    """Load a damaged file within the limits; return "read" or "refused"."""
    start, outcome = time.process_time(), "read"
    with watched():
        try:
            loader.load(data)
        except (ValueError, FileNotFoundError):
            outcome = "refused"
    seconds = time.process_time() - start
    assert not seen_events, f"it caused {seen_events[:3]}"
    assert seconds < MAX_SECONDS, f"took {seconds:.2f} s for {len(data):,} bytes"
    return outcome


class Results:
    """Counts inputs, and keeps each different failure once."""

    def __init__(self, name: str):
        self.name, self.failures, self.start = name, {}, time.monotonic()
        self.counts = {"read": 0, "refused": 0, "failed": 0}

    def run(self, loader: Loader, data: bytes) -> None:
        try:
            self.counts[check(loader, data)] += 1
        except Exception as error:
            self.fail(error, data)
        done = sum(self.counts.values())
        if done % 20_000 == 0:
            print(f"{self.name}: {done:,} inputs, {self.counts}, {time.monotonic() - self.start:,.0f} s", flush=True)

    def fail(self, error: Exception, data: bytes) -> None:
        self.counts["failed"] += 1
        where = traceback.extract_tb(error.__traceback__)[-1]
        key = f"{type(error).__name__} at {Path(where.filename).name}:{where.lineno}"
        if key not in self.failures:
            self.failures[key] = str(error)[:200]
            Path(f"crash-{self.name}-{sum(self.counts.values())}").write_bytes(data)
            print(f"{self.name}: {key}: {self.failures[key]}", flush=True)


def fuzz(name: str, runs: int, seed: int, seeds: list[bytes]) -> int:
    """Test one loader with damaged `seeds`; return the number of different failures."""
    loader, rng = LOADERS[name], np.random.default_rng([seed, len(name)])
    ignore_digests(seeds)
    for content in seeds:
        with contextlib.suppress(ValueError):
            loader.load(content)  # imports what it needs
    results = Results(name)
    for _ in range(-(-runs // CHUNK)):
        try:
            in_batches((damage(seeds, rng) for _ in range(CHUNK)), lambda data: results.run(loader, data))
        except AssertionError as error:
            results.fail(error, getattr(error, "data", b""))
        gc.collect()
    print(
        f"{name}: {sum(results.counts.values()):,} inputs, {results.counts}, {len(results.failures)} different failures"
    )
    return len(results.failures)


def small_run(folder: Path) -> Path:
    """Train a tiny network, and return its folder."""
    cfg = mf.recipe("digits", **{"model.width": 2, "optim.epochs": 1, "data.limit": 64})
    mf.train(cfg, folder, track=())
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("loaders", nargs="+", choices=[*LOADERS, "all"], metavar="LOADER", help="what to test")
    parser.add_argument("--runs", type=int, default=100_000, help="inputs for each (default: 100000)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the damage (default: 0)")
    args = parser.parse_args()
    logging.getLogger("multifire").setLevel(logging.CRITICAL)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    try:
        run = small_run(SCRATCH / "trained")
        sys.addaudithook(watch)
        names = LOADERS if "all" in args.loaders else args.loaders
        seeds = {name: LOADERS[name].seeds(run) for name in names}  # before digests are ignored
        failures = sum(fuzz(name, args.runs, args.seed, seeds[name]) for name in names)
    finally:
        shutil.rmtree(SCRATCH, ignore_errors=True)
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
