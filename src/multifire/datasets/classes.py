"""Find the classes of own data in folders: train/CLASS/... and test/CLASS/..., or CLASS/... alone.

Folders and files whose names begin with a dot are not read.
"""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from multifire.config import DataConfig
from multifire.utils.log import log

TRAIN, TEST = "train", "test"
CACHE_FOLDER = ".multifire"
"""Folder beside the classes that holds what was made of them."""
TEST_NAMES = ("test", "val")
"""Folders of the test; ImageNet's copies call it val."""
SPLIT_NAMES = {"train", "training", "test", "testing", "val", "valid", "validation"}
"""Names in small letters that folders of classes do not have, but parts of a data set."""


@dataclass(frozen=True)
class File:
    """A file of a class."""

    path: Path
    label: int
    split: str


@dataclass(frozen=True)
class Listing:
    """The files of own data, and their classes."""

    home: Path
    classes: tuple[str, ...]
    files: tuple[File, ...]
    """In the order of the samples: by file name, then by class, so that 2.png comes before 10.png."""


def find_home(root: Path, name: str) -> Path:
    """Return root/NAME if there is such a folder, else root.

    Raises:
        FileNotFoundError: there is no folder `root`.
    """
    home = root / name if (root / name).is_dir() else root
    if not home.is_dir():
        found = "is a file" if home.is_file() else "no such folder"
        raise FileNotFoundError(f"{home}: {found}, expected a folder with train/CLASS/...; give it with --data.root")
    return home


def list_classes(home: Path, suffixes: tuple[str, ...] | None, cfg: DataConfig, what: str) -> Listing:
    """List the files of each class, and divide them by seed if there is no folder for the test.

    Args:
        home: the folder that holds train/CLASS and perhaps test/CLASS, or CLASS.
        suffixes: endings of the files in small letters; None: any.
        cfg: names of the classes, test_share and split_seed.
        what: "pictures" or "recordings", for messages.

    Raises:
        FileNotFoundError: no class has a file.
        ValueError: one class, an empty class, a class of the test that is not trained, other classes than expected, or
            a class that is called like a part of a data set.
    """
    train = home / TRAIN if (home / TRAIN).is_dir() else home
    if train == home:
        _refuse_splits(home)
    tests = [home / name for name in TEST_NAMES if train != home and (home / name).is_dir()]
    for unused in tests[1:]:
        log.info("%s is not read: the test is %s", unused, tests[0])
    found = {folder.name: _files(folder, suffixes) for folder in _folders(train)}
    names = _check_names(train, found, cfg, suffixes, what)
    files = [File(path, label, TRAIN) for label, name in enumerate(names) for path in found[name]]
    if tests:
        files += _test_files(tests[0], names, suffixes, what)
    else:
        files = _divided(files, names, cfg, train)
    files.sort(key=lambda file: (file.split != TRAIN, natural(file.path.stem), file.label, natural(str(file.path))))
    return Listing(home, names, tuple(files))


def _refuse_splits(home: Path) -> None:
    for folder in _folders(home):
        if folder.name.lower() in SPLIT_NAMES:
            raise ValueError(
                f"{home}: holds the folder {folder.name}, expected the folders train and test, or only folders of "
                "classes; rename it"
            )


def natural(text: str) -> tuple[tuple[int, int, str], ...]:
    """Return a key that sorts numbers within names by their value: 2 before 10."""
    parts = re.findall(r"[0-9]+|[^0-9]+", text)
    return tuple((0, int(part), part) if part.isdecimal() else (1, 0, part) for part in parts)


def _folders(home: Path) -> list[Path]:
    folders = [path for path in home.iterdir() if path.is_dir() and not path.name.startswith(".")]
    return sorted(folders, key=lambda path: natural(path.name))


def _files(folder: Path, suffixes: tuple[str, ...] | None) -> list[Path]:
    def walk() -> Iterator[Path]:
        for place, folders, names in os.walk(folder, followlinks=False):
            folders[:] = [name for name in folders if not name.startswith(".")]
            for name in names:
                if not name.startswith(".") and (suffixes is None or Path(name).suffix.lower() in suffixes):
                    yield Path(place, name)

    return list(walk())


def _check_names(
    train: Path, found: dict[str, list[Path]], cfg: DataConfig, suffixes: tuple[str, ...] | None, what: str
) -> tuple[str, ...]:
    """Return the names of the classes in the order of their labels."""
    kinds = f" ({', '.join(suffix[1:] for suffix in suffixes)})" if suffixes else ""
    if not any(found.values()):
        raise FileNotFoundError(
            f"{train}: holds no folder CLASS with {what}{kinds}, expected one for each class; give the folder that "
            "holds train/CLASS with --data.root"
        )
    for name, files in found.items():
        if not files:
            raise ValueError(
                f"{train / name}: class {name!r} holds no {what}{kinds}; add some, or take the folder away"
            )
    if len(found) < 2:
        raise ValueError(f"{train}: holds one class, {next(iter(found))!r}, expected at least two folders of {what}")
    if cfg.classes is None:
        return tuple(found)
    absent, more = [name for name in cfg.classes if name not in found], [n for n in found if n not in cfg.classes]
    if absent or more:
        words = [f"no class {absent[0]!r}"] * bool(absent) + [f"a class {more[0]!r}"] * bool(more)
        raise ValueError(f"{train}: holds {' and '.join(words)}, expected those of data.classes; make both agree")
    return cfg.classes


def _test_files(home: Path, names: tuple[str, ...], suffixes: tuple[str, ...] | None, what: str) -> list[File]:
    files = []
    for folder in _folders(home):
        if folder.name not in names:
            raise ValueError(
                f"{folder}: a class that {home.parent / TRAIN} does not have; take it away, or train it too"
            )
        files += [File(path, names.index(folder.name), TEST) for path in _files(folder, suffixes)]
    if not files:
        raise ValueError(f"{home}: holds no {what}; add some, or take the folder away to divide {TRAIN} by seed")
    return files


def _divided(files: list[File], names: tuple[str, ...], cfg: DataConfig, home: Path) -> list[File]:
    files = sorted(files, key=lambda file: natural(str(file.path)))
    held = divide(np.array([file.label for file in files]), names, cfg, str(home))
    return [File(file.path, file.label, TEST if test else TRAIN) for file, test in zip(files, held, strict=True)]


def divide(labels: np.ndarray, names: tuple[str, ...], cfg: DataConfig, where: str) -> np.ndarray:
    """Return a mask of the samples that are held out for the test: data.test_share of each class, at least one.

    Raises:
        ValueError: a class has one sample, which cannot be in both parts.
    """
    held = np.zeros(len(labels), dtype=bool)
    for label, name in enumerate(names):
        members = np.flatnonzero(labels == label)
        if len(members) < 2:
            raise ValueError(
                f"{where}: class {name!r} has {len(members)} sample, expected at least two, one of them for the test; "
                "add some, or give the test samples yourself"
            )
        count = min(max(round(cfg.test_share * len(members)), 1), len(members) - 1)
        held[np.random.default_rng([cfg.split_seed or 0, label]).permutation(members)[:count]] = True
    log.info(
        "%s has no part for the test: %s of %s samples are held out for it (data.test_share, data.split_seed)",
        where, f"{held.sum():,}", f"{len(labels):,}",
    )  # fmt: skip
    return held
