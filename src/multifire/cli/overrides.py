"""Parse overrides of a recipe on the command line, for the commands train, sweep and bench."""

import contextlib
import dataclasses
import io
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from multifire.cli.code import recipe_from
from multifire.config import RECIPES, RunConfig, get_recipe
from multifire.utils.errors import nearest

Arguments = TypeVar("Arguments", bound=RunConfig)


def parse_overrides(
    cfg: RunConfig, args: Sequence[str], command: str, arguments: type[Arguments]
) -> tuple[RunConfig, Arguments]:
    """Apply the overrides on the command line to `cfg`.

    Args:
        cfg: the recipe's configuration.
        args: the command line after the recipe's name.
        command: name of the command, for its help.
        arguments: a subclass of RunConfig, whose further fields are the command's own options.

    Returns:
        The configuration with the overrides, and an instance of `arguments` with all values.

    Raises:
        ValueError: an override is unknown (the message suggests the nearest), or its value is not valid.
    """
    import tyro

    message = io.StringIO()
    try:
        with contextlib.redirect_stderr(message):
            parsed, unrecognised = tyro.cli(
                arguments,
                default=arguments(**vars(cfg)),
                args=_complete_resume(args),
                return_unknown_args=True,
                prog=f"multifire {command} {cfg.recipe}",
                description=f"the recipe in {cfg.code}" if cfg.code else RECIPES[cfg.recipe].about,
            )
    except SystemExit as stop:
        if not stop.code:
            raise  # --help, which is no error
        raise ValueError(_one_line(message.getvalue(), arguments.__name__)) from None
    if unrecognised:
        options = [f"--{name}" for name in _option_names(arguments(**vars(cfg)))]
        suggestion = nearest(unrecognised[0].replace("_", "-"), options) or ";"
        raise ValueError(
            f"unknown override {unrecognised[0]!r}{suggestion} `multifire {command} {cfg.recipe} --help` lists them"
        )
    values = {field.name: getattr(parsed, field.name) for field in dataclasses.fields(RunConfig)}
    return RunConfig(**values), parsed


def asks_for_help(argv: Sequence[str]) -> bool:
    """Return True if there are no arguments, or if --help stands in the place of the recipe."""
    return not argv or argv[0] in ("-h", "--help")


def recipe_of(argv: Sequence[str], command: str) -> RunConfig:
    """Return the configuration of the recipe that the first argument names, which may be a Python file.

    Raises:
        ValueError: the recipe is unknown, or an option stands in its place.
    """
    if argv[0].startswith("-"):
        usage = f"multifire {command} RECIPE [--overrides]"
        raise ValueError(f"expected a recipe before {argv[0]}: {usage}; recipes: {', '.join(RECIPES)}")
    if argv[0].endswith(".py"):
        return recipe_from(Path(argv[0]))
    return get_recipe(argv[0])


def parse_seeds(text: str) -> list[int]:
    """Return the numbers in a text such as 0,1,2.

    Raises:
        ValueError: the text holds something else, or a number twice.
    """
    numbers = [number.strip() for number in text.split(",")]
    if not all(number.isdecimal() for number in numbers) or len(set(map(int, numbers))) < len(numbers):
        raise ValueError(f"seeds is {text!r}, expected different numbers such as 0,1,2")
    return [int(number) for number in numbers]


def _complete_resume(args: Sequence[str]) -> list[str]:
    """Replace `--resume` without a value by `--resume yes`."""
    completed = []
    for arg, following in itertools.zip_longest(args, args[1:], fillvalue=""):
        completed += [arg, "yes"] if arg == "--resume" and following not in ("no", "yes", "auto") else [arg]
    return completed


def _option_names(value: Any, prefix: str = "") -> list[str]:
    names = []
    for field in dataclasses.fields(value):
        name, inner = prefix + field.name.replace("_", "-"), getattr(value, field.name)
        names += _option_names(inner, f"{name}.") if dataclasses.is_dataclass(inner) else [name]
    return names


def _one_line(box: str, title: str) -> str:
    """Return the message in tyro's box, up to the first horizontal line in it, as one line."""
    lines = []
    for line in box.splitlines():
        inner = line.strip("│ ")
        if line.startswith(("╭", "╰")):
            continue
        if inner.startswith("──"):
            break
        lines.append(inner)
    return " ".join(lines).removeprefix(f"Error parsing {title}: ") or " ".join(box.split())
