"""Run a file of the user's that registers networks, data sets or surrogates, or holds a recipe.

Only a file that is named on the command line is run. A run's folder records the file's path and digest, but its code is
never run because the folder names it.
"""

import dataclasses
import hashlib
import importlib.util
import json
import sys
import traceback
from pathlib import Path
from typing import Any

from multifire.config import RunConfig
from multifire.utils.log import log

_loaded: dict[Path, Any] = {}


def run_code(path: Path, run: Path | None = None) -> Any:
    """Run the file once and return it as a module; warn if it has changed since it trained the run in the folder `run`.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file raises an error, whose traceback is printed.
    """
    path = path.resolve()
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; give a Python file")
    if run is not None:
        _warn_if_changed(path, run)
    if path not in _loaded:
        _loaded[path] = _execute(path)
    return _loaded[path]


def recipe_from(path: Path) -> RunConfig:
    """Run a recipe file and return its `recipe`, with the file's path and digest.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file raises an error, or defines no RunConfig named `recipe`.
    """
    found = getattr(run_code(path), "recipe", None)
    if not isinstance(found, RunConfig):
        raise ValueError(
            f"{path}: found {'no' if found is None else type(found).__name__ + ' as'} `recipe`, expected a RunConfig, "
            'such as recipe = mf.recipe("digits", **{"model.name": "my-net"})'
        )
    return dataclasses.replace(found, recipe=path.stem, code=str(path), code_sha256=digest(path))


def digest(path: Path) -> str:
    """Return the SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _execute(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(f"multifire_code_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise ValueError(f"{path}: not a Python file; its name must end with .py")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        own = [frame for frame in frames if Path(frame.filename) == path] or frames
        sys.stderr.write("".join(["Traceback (most recent call last):\n", *traceback.format_list(own)]))
        raise ValueError(f"{path}: {type(error).__name__}: {error}") from None
    return module


def _warn_if_changed(path: Path, run: Path) -> None:
    try:
        recorded = json.loads((run / "config.json").read_text()).get("code_sha256")
    except (OSError, ValueError, AttributeError):
        return
    if recorded and recorded != digest(path):
        log.warning("%s has changed since it trained %s; its network may compute something else", path, run)
