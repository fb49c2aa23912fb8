"""Cut recordings into a cache of frames, in parallel; resumable after a kill; a second process waits for the first.

Recordings are processed in parts, each written atomically. After a kill the next run uses the finished parts. The last
step joins all parts in the order of their keys, so the result does not depend on the order of work.
"""

import hashlib
import io
import logging
import multiprocessing
import os
import shutil
import signal
import threading
import zipfile
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import fields
from functools import partial
from multiprocessing.connection import wait as wait_for
from pathlib import Path
from typing import NamedTuple

import numpy as np

from multifire.config import DataConfig
from multifire.datasets import (
    asl_dvs,
    cifar10_dvs,
    digits_dvs,
    dvs_gesture,
    dvs_lip,
    ncaltech101,
    nmnist,
    own_recordings,
)
from multifire.datasets.cache import (
    OWN,
    SPLITS,
    Record,
    SplitRecord,
    cache_folder,
    cache_options,
    command,
    frame_options,
    read_record,
    write_record,
)
from multifire.datasets.recordings import Job, Sample, Source
from multifire.datasets.registry import get_info
from multifire.events import Frames, frames_of_windows
from multifire.utils.files import explain_full_disk, flush_folder, hold_lock, write_atomic
from multifire.utils.log import log

FULL_DISK = "finished recordings are kept: make room, and the same command continues"

FINDERS: dict[str, Callable[[Path, DataConfig], Source]] = {
    "dvs-gesture": dvs_gesture.find,
    "cifar10-dvs": cifar10_dvs.find,
    "nmnist": nmnist.find,
    "ncaltech101": ncaltech101.find,
    "dvs-lip": dvs_lip.find,
    "asl-dvs": asl_dvs.find,
    "digits-dvs": digits_dvs.find,
    OWN: own_recordings.find,
}
Progress = Callable[[int, int], None]
"""Called with the number of finished recordings and of all recordings."""
MAX_WARNINGS = 10
SILENT_US = 1_000_000
"""A sensor's noise alone makes events more often."""


class Part(NamedTuple):
    """Samples cut out of the recordings of one job."""

    recordings: np.ndarray
    """Number of recordings."""
    frames: np.ndarray
    """uint8 [n, T, 2, H, W]."""
    splits: np.ndarray
    """Index into SPLITS of each sample; for the following fields see SplitRecord."""
    names: np.ndarray
    labels: np.ndarray
    events: np.ndarray
    span_us: np.ndarray
    clipped: np.ndarray


def prepare(
    cfg: DataConfig,
    root: Path,
    source: Path | None = None,
    *,
    rebuild: bool = False,
    workers: int | None = None,
    on_progress: Progress | None = None,
) -> Path:
    """Cut the recordings of cfg.name into frames; do nothing if the cache exists.

    Args:
        cfg: the data set and its frame options.
        root: folder of the data sets and of the cache.
        source: archive or folder with the recordings; by default root/NAME.
        rebuild: delete the existing cache.
        workers: processes (default: one for each core); with 1, no further process is started.
        on_progress: called after every recording.

    Returns:
        The cache's folder.

    Raises:
        FileNotFoundError: no recordings; the message says how to get them.
        ValueError: a damaged recording, label file or archive, or a cache made from another source.
        OSError: the disk is full or fails; finished parts are kept.
    """
    if cfg.name not in FINDERS:
        raise ValueError(f"{cfg.name} holds images, which need no preparation")
    if workers is not None and workers < 1:
        raise ValueError(f"workers is {workers}, expected at least 1")
    folder = cache_folder(cfg, root)
    if not rebuild and source is None and cfg.name != OWN and (folder / "cache.json").is_file():
        read_record(folder, cfg, root)
        return folder
    if source is not None and not source.exists():
        raise FileNotFoundError(f"{source}: no such file or folder")
    default = own_recordings.home(root) if cfg.name == OWN else root / cfg.name
    location = default if source is None else source
    found = FINDERS[cfg.name](location, cfg)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with hold_lock(folder.with_name(f"{folder.name}.lock"), _say_busy), explain_full_disk(folder, FULL_DISK):
        rebuild = rebuild or (cfg.name == OWN and _has_changed(folder, cfg, root, found))
        if rebuild and folder.exists():
            (folder / "cache.json").unlink(missing_ok=True)
            shutil.rmtree(folder)
        if (folder / "cache.json").is_file():
            _check_same_source(read_record(folder, cfg, root), found, folder, command(cfg, root, "--rebuild"))
            return folder
        parts = folder / f"parts-{found.fingerprint[:12]}"
        _make_parts(parts, found, cfg, workers or os.cpu_count() or 1, on_progress or (lambda *_: None))
        _join(folder, parts, cfg, found)
    return folder


def _has_changed(folder: Path, cfg: DataConfig, root: Path, found: Source) -> bool:
    """Return True if own recordings were added, changed or taken away since their frames were made."""
    changed = (folder / "cache.json").is_file() and read_record(folder, cfg, root).source != found.fingerprint
    if changed:
        log.info("the recordings in %s have changed; their frames are made again", found.files[0])
    return changed


def _say_busy() -> None:
    log.info("another process prepares the same; waiting for it")


def _check_same_source(record: Record, found: Source, folder: Path, again: str) -> None:
    if record.source != found.fingerprint:
        names = ", ".join(record.source_names)
        raise ValueError(
            f"{folder}: was made from another source ({names}), not from {', '.join(map(str, found.files))} as it is "
            f"now; leave out --source to keep it, or run `{again}` with that --source"
        )


def _make_parts(parts: Path, source: Source, cfg: DataConfig, workers: int, on_progress: Progress) -> None:
    spool = parts / "spool"
    shutil.rmtree(spool, ignore_errors=True)
    spool.mkdir(parents=True)
    for torn in parts.glob(".*.tmp"):
        torn.unlink()
    before = {path.stem for path in parts.glob("*.npz")}
    jobs = source.jobs(before, spool)
    done = sum(int(_read_part(path).recordings) for path in parts.glob("*.npz"))
    on_progress(done, source.total)
    for job, part in _results(jobs, cfg, workers):
        _write_part(parts / f"{job.key}.npz", part)
        if job.spooled:
            job.spooled.unlink()
        done += len(job.recordings)
        on_progress(done, max(done, source.total))


def _write_part(path: Path, part: Part) -> None:
    content = io.BytesIO()
    np.savez(content, **part._asdict())
    write_atomic(path, content.getvalue())


def _read_part(path: Path) -> Part:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return Part(**{name: arrays[name] for name in Part._fields})
    except (ValueError, KeyError, zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise ValueError(f"{path}: damaged ({error}); delete it, and the same command makes it anew") from None


def _results(jobs: Iterator[Job], cfg: DataConfig, workers: int) -> Iterator[tuple[Job, Part]]:
    """Yield each job with its part as they finish; take only as many jobs as keep the workers busy."""
    if workers == 1:
        for job in jobs:
            yield job, make_part(job, cfg)
        return
    context = multiprocessing.get_context("spawn")  # a forked process would inherit the lock and torch's threads
    pool = ProcessPoolExecutor(workers, context, initializer=_start_worker)
    pending: dict[Future, Job] = {}
    warned = 0
    try:
        for job in _and_then_none(jobs):
            if job is not None:
                pending[pool.submit(_make_part_in_worker, job, cfg)] = job
            while pending and (job is None or len(pending) >= 2 * workers):
                for future in wait(pending, return_when=FIRST_COMPLETED).done:
                    part, messages = future.result()
                    warned = _warn(messages, warned)
                    yield pending.pop(future), part
    except BrokenProcessPool:
        raise OSError(
            "a worker was killed, perhaps for lack of memory; finished recordings are kept, and the command continues; "
            "--workers 1 needs least"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)
    if warned > MAX_WARNINGS:
        log.warning("and %s warnings more", f"{warned - MAX_WARNINGS:,}")


def _and_then_none(jobs: Iterator[Job]) -> Iterator[Job | None]:
    yield from jobs
    yield None


def _warn(messages: list[str], warned: int) -> int:
    for message in messages[: max(MAX_WARNINGS - warned, 0)]:
        log.warning("%s", message)
    return warned + len(messages)


class _Messages(logging.Handler):
    """Collects a worker's warnings for the parent process."""

    def __init__(self):
        super().__init__(logging.WARNING)
        self.kept: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.kept.append(record.getMessage())


_messages = _Messages()


def _start_worker() -> None:
    """Ignore Ctrl-C, collect warnings for the parent, and end when the parent ends, even by a kill."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    log.addHandler(_messages)
    log.propagate = False
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        wait_for([parent.sentinel])
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def _make_part_in_worker(job: Job, cfg: DataConfig) -> tuple[Part, list[str]]:
    _messages.kept.clear()
    return make_part(job, cfg), list(_messages.kept)


def make_part(job: Job, cfg: DataConfig) -> Part:
    """Read a job's recordings, each in one pass, and cut out its samples.

    Raises:
        ValueError: a damaged recording, or a sample without events.
    """
    options = frame_options(cfg)
    samples: list[Sample] = []
    cut: list[Frames] = []
    for opener, wanted in job.recordings:
        windows = [(sample.start_us, sample.end_us) for sample in wanted]
        frames = frames_of_windows(partial(opener.open, cfg.stray), windows, options)
        for sample, found in zip(wanted, frames, strict=True):
            _check_sample(sample, found)
        samples += wanted
        cut += frames
    return Part(
        recordings=np.array(len(job.recordings)),
        frames=np.stack([frames.counts for frames in cut]),
        splits=np.array([SPLITS.index(sample.split) for sample in samples]),
        names=np.array([sample.name for sample in samples]),
        labels=np.array([sample.label for sample in samples]),
        events=np.array([frames.events for frames in cut]),
        span_us=np.array([frames.last_us - frames.first_us for frames in cut]),
        clipped=np.array([frames.clipped for frames in cut]),
    )


def _check_sample(sample: Sample, frames: Frames) -> None:
    window = "" if sample.start_us is None else f" from {sample.start_us:,} to {sample.end_us:,} µs"
    if not frames.events:
        raise ValueError(
            f"{sample.name}: holds no event{window}: its label lies beyond the recording, or that is cut short; "
            "fetch it again, or take it out of the source"
        )
    if sample.end_us is not None and sample.end_us - frames.last_us > SILENT_US:
        log.warning("%s: its last event is at %s µs, its label ends at %s", sample.name, frames.last_us, sample.end_us)


def _join(folder: Path, parts: Path, cfg: DataConfig, source: Source) -> None:
    """Join the parts into splits, write the record that completes the cache, and delete the parts."""
    paths = sorted(parts.glob("*.npz"))
    splits = {split: _write_split(folder / f"{split}.npy", index, paths) for index, split in enumerate(SPLITS)}
    sizes = (len(splits["train"].labels), len(splits["test"].labels))
    if 0 in sizes:
        raise ValueError(f"{source.files[0]}: makes {sizes[0]:,} training and {sizes[1]:,} test samples; needs both")
    _report(cfg, sizes, splits)
    names = [path.name for path in source.files]
    own = (list(source.classes), list(source.sensor))
    write_record(folder, Record(cache_options(cfg), source.fingerprint, names, splits, *own))
    for old in folder.glob("parts-*"):
        shutil.rmtree(old)


def _report(cfg: DataConfig, sizes: tuple[int, int], splits: dict[str, SplitRecord]) -> None:
    info = None if cfg.name == OWN else get_info(cfg.name)
    if info and not info.is_published(*sizes):
        log.warning(
            "%s: %s training and %s test samples; the published data set has %s and %s",
            cfg.name, *(f"{count:,}" for count in (*sizes, *info.published_sizes)),
        )  # fmt: skip
    clipped = sum(sum(record.clipped) for record in splits.values())
    if clipped:
        log.warning("%s: %s cells saw more than 255 events, and say 255", cfg.name, f"{clipped:,}")


def _write_split(path: Path, split: int, parts: list[Path]) -> SplitRecord:
    """Join the samples of a split, one part in memory at a time."""
    columns = [field.name for field in fields(SplitRecord) if field.name in Part._fields]
    rows: dict[str, list] = {name: [] for name in columns}
    shape: tuple[int, ...] = ()
    for part in map(_read_part, parts):
        mine = part.splits == split
        shape = part.frames.shape[1:]
        for name in columns:
            rows[name] += getattr(part, name)[mine].tolist()
    count = len(rows["labels"])
    beside = path.with_name(f".{path.name}.tmp")
    with beside.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": (count, *shape)})
        for part in map(_read_part, parts):
            file.write(part.frames[part.splits == split].tobytes())
        file.flush()
        os.fsync(file.fileno())
    with beside.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    beside.replace(path)
    flush_folder(path.parent)
    return SplitRecord(shape=[count, *shape], sha256=digest, **rows)
