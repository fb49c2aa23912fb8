"""Prepare the imports of a machine that has torch and little else; imports nothing but the standard library."""

import importlib.util
import os
import sys
import tempfile
import types
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[2]


def prepare_imports(wheels: Path) -> None:
    """Let Python find the working tree first and the carried wheels last, so that they replace nothing installed.

    Wheels are unpacked into a temporary folder. Without rich, `multifire` prints through plain stand-ins.
    """
    script_folder = str(ROOT / "benchmarks")  # holds modules such as cases.py, which must not be found by that name
    sys.path[:] = [str(ROOT), str(ROOT / "src"), *(entry for entry in sys.path if entry != script_folder)]
    carried = sorted(wheels.glob("*.whl"))
    if carried:
        target = tempfile.mkdtemp(prefix="wheels-")
        for wheel in carried:
            zipfile.ZipFile(wheel).extractall(target)
        sys.path.append(target)
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)  # for the tests, which run in a process of their own
    if importlib.util.find_spec("rich") is None:
        _replace_rich()


def _replace_rich() -> None:
    """Define the names that `multifire.utils.progress` imports; nothing is drawn, lines are printed."""

    class Console:
        is_terminal = False

        def print(self, line: str, **_style) -> None:
            print(line, flush=True)

    console = types.ModuleType("rich.console")
    progress = types.ModuleType("rich.progress")
    vars(console)["Console"] = Console
    vars(progress).update(dict.fromkeys(("BarColumn", "Progress", "TextColumn", "TimeRemainingColumn")))
    sys.modules.update({"rich": types.ModuleType("rich"), "rich.console": console, "rich.progress": progress})
