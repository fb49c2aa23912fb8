"""Own pictures in folders of classes, decoded once into a cache.

    HOME/.multifire/pictures-KEY/train.npy, test.npy    uint8 [N, C, H, W]
                                 pictures.json          checksums, classes, labels, mean and deviation

KEY is computed from the names, sizes and times of all files and from the options, so that a changed folder is decoded
again. pictures.json is written last: a cache with one is complete.
"""

import contextlib
import hashlib
import json
import math
import os
import shutil
import warnings
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from multifire.config import DataConfig
from multifire.config.schema import parse_size
from multifire.datasets.arrays import measure
from multifire.datasets.classes import CACHE_FOLDER, TEST, TRAIN, File, Listing, find_home, list_classes
from multifire.datasets.registry import OWN_DATA, DatasetInfo
from multifire.datasets.splits import Split
from multifire.utils.files import explain_full_disk, flush_folder, hold_lock, write_atomic
from multifire.utils.log import log
from multifire.utils.progress import Bar

FULL_DISK = "make room there, and run the same command again"

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
FORMATS = ("PNG", "JPEG", "WEBP")
GREY_MODES, COLOUR_MODES = ("1", "L", "LA"), ("P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV", "LAB")
CACHE_VERSION = 1
MAX_PIXELS = 1 << 26
"""Pixels of a picture; larger ones are refused before they are decoded."""
BLOCK, MAX_DECODED = 256, 256 << 20  # pictures, bytes
"""Maximum number and size of the pictures that are decoded at a time."""


@dataclass(frozen=True)
class Options:
    """What is asked of every picture."""

    size: tuple[int, int] | None
    """Height and width to which it is stretched; None: as it is."""
    channels: int | None
    """1 or 3, to which it is converted; None: as it is."""


def read(root: Path, cfg: DataConfig) -> tuple[Split, Split, DatasetInfo]:
    """Read the pictures of `root`, from the cache if they have not changed; decode them else, with a progress bar.

    Args:
        root: the folder that holds train/CLASS and perhaps test/CLASS, or CLASS; or whose subfolder `folder` does.
        cfg: size, channels, classes, test_share and split_seed.

    Raises:
        FileNotFoundError: no pictures.
        ValueError: a broken picture, pictures of several sizes or kinds, or see `list_classes`; names a picture.
        OSError: no room on the disk.
    """
    listing = list_classes(find_home(root, "folder"), SUFFIXES, cfg, "pictures")
    options = Options(parse_size(cfg.size, "data.size") if cfg.size else None, cfg.channels)
    folder = listing.home / CACHE_FOLDER / f"pictures-{_key(listing, options)}"
    if not os.access(listing.home, os.W_OK):
        log.warning("%s cannot be written, so its pictures are decoded anew for each run", listing.home)
        train, test = (np.stack(list(_images(listing, split, options))) for split in (TRAIN, TEST))
        return _result(listing, train, test, *measure(train))
    folder.mkdir(parents=True, exist_ok=True)
    with hold_lock(folder / ".lock", _say_busy), explain_full_disk(folder, FULL_DISK):
        record = _read_record(folder)
        if record is None:
            record = _fill(folder, listing, options)
    train, test = (np.load(folder / f"{split}.npy", mmap_mode="r", allow_pickle=False) for split in (TRAIN, TEST))
    return _result(listing, train, test, tuple(record["mean"]), tuple(record["std"]))


def _say_busy() -> None:
    log.info("another process decodes the same pictures; waiting for it")


def _key(listing: Listing, options: Options) -> str:
    """Return a digest of everything that decides what the cache holds."""
    rows: list[Any] = [CACHE_VERSION, options.size, options.channels, listing.classes]
    for file in listing.files:
        stat = file.path.stat()
        rows.append((str(file.path.relative_to(listing.home)), stat.st_size, stat.st_mtime_ns, file.label, file.split))
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16]


def _result(
    listing: Listing, train: np.ndarray, test: np.ndarray, mean: tuple[float, ...], std: tuple[float, ...]
) -> tuple[Split, Split, DatasetInfo]:
    splits = [
        Split(images, np.array([file.label for file in listing.files if file.split == split], dtype=np.int64))
        for split, images in ((TRAIN, train), (TEST, test))
    ]
    channels, height, width = train.shape[1:]
    info = DatasetInfo(
        about=OWN_DATA["folder"],
        channels=channels,
        size=height,
        classes=listing.classes,
        mean=mean,
        std=std,
        published_sizes=(len(train), len(test)),
        width=width if width != height else None,
    )
    return splits[0], splits[1], info


def _read_record(folder: Path) -> dict[str, Any] | None:
    """Return the record of a complete and sound cache, or None."""
    path = folder / "pictures.json"
    try:
        record = json.loads(path.read_bytes())
        for split in (TRAIN, TEST):
            with (folder / f"{split}.npy").open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != record["sha256"][split]:
                    raise ValueError("its content does not match its checksum")
        return {name: list(map(float, record[name])) for name in ("mean", "std")}
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        log.warning("%s: damaged (%s); the pictures are decoded again", folder, " ".join(str(error).split()))
        path.unlink(missing_ok=True)
        return None


def _fill(folder: Path, listing: Listing, options: Options) -> dict[str, Any]:
    """Decode all pictures into the cache; a killed process leaves one without a record, which is filled again."""
    _remove_torn(folder)
    first = _first(listing, options)
    _check_room(folder, len(listing.files) * first.size)
    with Bar("decoding pictures", len(listing.files)) as bar:
        digests = {split: _write(folder / f"{split}.npy", listing, split, options, bar) for split in (TRAIN, TEST)}
    mean, std = measure(np.load(folder / f"{TRAIN}.npy", mmap_mode="r", allow_pickle=False))
    record = {"sha256": digests, "mean": mean, "std": std}
    write_atomic(folder / "pictures.json", (json.dumps(record) + "\n").encode())
    return record


def _remove_torn(folder: Path) -> None:
    """Remove other caches that killed processes left without a record; a living process holds its lock."""
    for old in folder.parent.glob("pictures-*"):
        if old != folder and not (old / "pictures.json").exists():
            with contextlib.suppress(BlockingIOError), hold_lock(old / ".lock", _refuse):
                shutil.rmtree(old)


def _refuse() -> None:
    raise BlockingIOError


def _write(path: Path, listing: Listing, split: str, options: Options, bar: Bar) -> str:
    """Write the decoded pictures of a split; return the checksum of the file."""
    images = _images(listing, split, options)
    count = sum(file.split == split for file in listing.files)
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("wb") as file:  # not mapped: a full disk would kill the process
        shape = (count, *_first(listing, options).shape)
        np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
        for image in images:
            file.write(image.tobytes())
            bar.advance()
        file.flush()
        os.fsync(file.fileno())
    with temporary.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    temporary.replace(path)
    flush_folder(path.parent)
    return digest


def _first(listing: Listing, options: Options) -> np.ndarray:
    """Return the first training picture, which decides the size and kind of all."""
    return decode(listing.files[0].path, options)


def _images(listing: Listing, split: str, options: Options) -> Iterator[np.ndarray]:
    """Decode the pictures of a split in order, and check that they are like the first training picture."""
    shape = _first(listing, options).shape
    files = [file for file in listing.files if file.split == split]
    for file, image in zip(files, _decoded(files, options, math.prod(shape)), strict=True):
        if image.shape != shape:
            raise _unlike(file.path, image.shape, listing.files[0].path, shape)
        yield image


def _check_room(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(
            f"{folder}: the decoded pictures need {needed / 1e6:,.1f} MB, {free / 1e6:,.1f} MB are free; make room, or "
            "give a smaller --data.size"
        )


def _decoded(files: list[File], options: Options, bytes_each: int) -> Iterator[np.ndarray]:
    """Decode files on all cores, in order, a block of at most MAX_DECODED at a time."""
    count = max(min(BLOCK, MAX_DECODED // max(bytes_each, 1)), os.cpu_count() or 1)
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        for start in range(0, len(files), count):
            block: Iterable[File] = files[start : start + count]
            yield from pool.map(lambda file: decode(file.path, options), block)


def _unlike(path: Path, found: tuple[int, ...], first: Path, expected: tuple[int, ...]) -> ValueError:
    if found[0] != expected[0]:
        kinds = {1: "grey", 3: "RGB"}
        return ValueError(
            f"{path}: is {kinds[found[0]]}, but {first} is {kinds[expected[0]]}, expected one kind; "
            "--data.channels 3 converts all pictures to RGB, --data.channels 1 to grey"
        )
    size, wanted = (f"{shape[1]}x{shape[2]}" for shape in (found, expected))
    return ValueError(
        f"{path}: is {size} pixels (height x width), but {first} is {wanted}, expected one size; "
        f"--data.size {wanted} stretches all pictures to it"
    )


def decode(path: Path, options: Options) -> np.ndarray:
    """Return a picture as bytes [C, H, W], grey or RGB; transparency is dropped.

    Raises:
        ValueError: broken, too large, or not of 8 bits.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of Pillow, about metadata and large pictures
            with Image.open(path, formats=FORMATS) as picture:
                return _pixels(picture, path, options)
    except FileNotFoundError:
        raise
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError, MemoryError, IndexError) as error:
        if isinstance(error, ValueError) and str(error).startswith(f"{path}: "):
            raise
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ValueError(
            f"{path}: broken, or no PNG, JPEG or WebP picture ({reason}); replace it or take it away"
        ) from None


def _pixels(picture: Image.Image, path: Path, options: Options) -> np.ndarray:
    if picture.width * picture.height > MAX_PIXELS:
        raise ValueError(f"{path}: has {picture.width:,} x {picture.height:,} pixels, expected at most {MAX_PIXELS:,}")
    if picture.mode not in GREY_MODES + COLOUR_MODES:
        raise ValueError(
            f"{path}: has pixels of the kind {picture.mode!r}, expected 8 bits for each channel; convert it"
        )
    channels = options.channels or (1 if picture.mode in GREY_MODES else 3)
    picture = picture.convert("L" if channels == 1 else "RGB")
    if options.size and (picture.height, picture.width) != options.size:
        height, width = options.size
        picture = picture.resize((width, height), Image.Resampling.BILINEAR)
    pixels = np.asarray(picture)
    return pixels[None] if channels == 1 else pixels.transpose(2, 0, 1)
