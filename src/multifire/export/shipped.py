"""Trained networks that are part of the package: a small run folder for each, without the optimiser's state."""

import shutil
import tempfile
from pathlib import Path

FOLDER = Path(__file__).parent / "shipped"


def shipped_names() -> list[str]:
    """Return the names of the networks that the package contains."""
    return sorted(path.name for path in FOLDER.iterdir() if path.is_dir())


def shipped_run(name: str) -> Path:
    """Return the run folder in the package, which must not be written to.

    Raises:
        FileNotFoundError: the package contains no such network.
    """
    if name not in shipped_names():
        raise FileNotFoundError(f"{name}: no such network in the package; it contains {', '.join(shipped_names())}")
    return FOLDER / name


def copy_shipped(name: str, parent: Path) -> Path:
    """Copy the run of a network in the package to `parent`, unless it is there, and return the copy's folder.

    Raises:
        FileNotFoundError: the package contains no such network.
    """
    source, target = shipped_run(name), parent / f"pretrained-{name}"
    if not target.is_dir():
        parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=parent) as folder:
            shutil.copytree(source, Path(folder) / name)
            (Path(folder) / name).rename(target)  # so that an interrupted copy leaves no half of a run
    return target
