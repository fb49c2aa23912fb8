"""The command line: one file for each command, with its options and its output.

Only commands that compute import torch, so that help and tables appear at once.
"""

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from multifire import __version__
from multifire.cli import (
    bench,
    compare,
    data,
    demo,
    evaluate,
    export,
    inspect,
    recipes,
    report,
    run,
    summary,
    sweep,
    train,
)
from multifire.cli.code import run_code
from multifire.utils.errors import unknown
from multifire.utils.memory import keep_freed_memory
from multifire.utils.progress import CONSOLE

GREETING = """multifire: deep spiking neural networks of multi-level firing neurons. Try first:

  multifire demo --pretrained     a trained network at work: digits, dormant units, energy, a recording
  multifire demo                  train that network, a few minutes
  multifire summary digits        its layers, parameters and operations

`multifire --help` lists all commands, `multifire recipes` what can be trained."""
USER_ERROR = 2
INTERRUPTED = 130

COMMANDS = (demo, train, sweep, bench, evaluate, run, compare, report, summary, export, inspect, recipes, data)
"""The modules of the commands, in the order of the help text; each has `add_parser(commands)`."""
OVERRIDING = {"train": train.main, "sweep": sweep.main, "bench": bench.main}
"""Commands that take overrides of a recipe, which tyro parses instead of argparse."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code.

    An error that the user can fix prints one line on standard error and returns 2, without a traceback.
    """
    _set_up_log()
    argv = sys.argv[1:] if argv is None else list(argv)
    _let_threads_sleep()
    keep_freed_memory()
    try:
        if argv and argv[0] in OVERRIDING:
            return OVERRIDING[argv[0]](argv[1:])
        if not argv:
            print(GREETING)
            return 0
        args = _parser().parse_args(argv)
        if getattr(args, "code", None):
            for run in _runs_of(args) or [None]:
                run_code(args.code, run)
        return args.run(args)
    except BrokenPipeError:
        sys.stderr.close()  # the reader of our output has ended; this keeps Python from printing a warning at exit
        return 0
    except (ValueError, OSError, FloatingPointError, MemoryError) as error:
        print(f"multifire: error: {_one_line(error)}", file=sys.stderr)
        return USER_ERROR
    except KeyboardInterrupt:
        print("multifire: stopped", file=sys.stderr)
        return INTERRUPTED


def _runs_of(args: argparse.Namespace) -> list[Path]:
    """Return the folders of runs that a command is given, or what may be one."""
    named = getattr(args, "folders", None) or [getattr(args, "folder", None) or getattr(args, "what", None)]
    return [Path(name) for name in named if name is not None]


def _parser() -> "_Parser":
    parser = _Parser(
        prog="multifire",
        description="Train, examine and deploy deep spiking networks of multi-level firing neurons.",
        epilog="Start with `multifire demo`. `multifire COMMAND --help` explains a command.",
    )
    parser.add_argument("--version", action="version", version=f"multifire {__version__}")
    commands = parser.add_subparsers(metavar="command", title="commands")
    for command in COMMANDS:
        command.add_parser(commands)
    return parser


class _Parser(argparse.ArgumentParser):
    """argparse with one-line errors, which suggest the nearest known name for an unknown one."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; see `{self.prog} --help`")

    def parse_known_args(  # pyright: ignore[reportIncompatibleMethodOverride] - which has overloads
        self, args: Any = None, namespace: Any = None
    ) -> tuple[Any, list[str]]:
        """Parse; also take an argument that may be missing, such as RECORDING, from behind an option.

        argparse settles such an argument with the positional ones that stand before the first option.
        """
        found, rest = super().parse_known_args(args, namespace)
        for action in self._get_positional_actions():
            if action.nargs == "?" and getattr(found, action.dest) is None and rest and not rest[0].startswith("-"):
                setattr(found, action.dest, self._get_value(action, rest.pop(0)))
        return found, rest

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            raise unknown(str(action.metavar or action.dest), str(value), map(str, action.choices))


def _let_threads_sleep() -> None:
    """Let OpenMP's threads sleep while they wait, unless the user has set how they wait.

    By default they spin. If another process is busy, a spinning thread takes the core that the thread it waits for
    needs: a training step beside one busy process takes 1.6 s with spinning and 0.28 s with sleeping threads (two
    cores). Torch reads this setting when it is imported.
    """
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"} & os.environ.keys():
        os.environ["OMP_WAIT_POLICY"] = "passive"


def _one_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split())


def _set_up_log() -> None:
    from rich.logging import RichHandler

    log = logging.getLogger("multifire")
    if not log.handlers:
        log.addHandler(RichHandler(console=CONSOLE, show_time=False, show_path=False))
        log.setLevel(logging.INFO)
