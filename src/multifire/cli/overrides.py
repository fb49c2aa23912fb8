"""Overrides of a recipe on the command line, for the commands train, sweep and bench."""

import contextlib
import dataclasses
import io
import itertools
from collections.abc import Sequence
from typing import Any, TypeVar

from multifire.config import RECIPES, RunConfig, get_recipe
from multifire.utils.errors import nearest

Arguments = TypeVar("Arguments", bound=RunConfig)


def parse_overrides(
    cfg: RunConfig, args: Sequence[str], command: str, arguments: type[Arguments]
) -> tuple[RunConfig, Arguments]:
    """Apply the command line's overrides to `cfg`.

    Args:
        cfg: the recipe's configuration.
        args: the command line after the recipe's name.
        command: name of the command, for its help.
        arguments: a RunConfig with the command's own options as further fields.

    Returns:
        The configuration with overrides, and all arguments.

    Raises:
        ValueError: an unknown override (names the nearest) or a value that its field cannot hold.
    """
    import tyro

    message = io.StringIO()
    try:
        with contextlib.redirect_stderr(message):
            parsed, unrecognised = tyro.cli(
                arguments,
                default=arguments(**vars(cfg)),
                args=_spell_out_resume(args),
                return_unknown_args=True,
                prog=f"multifire {command} {cfg.recipe}",
                description=RECIPES[cfg.recipe].about,
            )
    except SystemExit as stop:
        if not stop.code:
            raise  # --help
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
    """Return True for no arguments or --help in the place of the recipe."""
    return not argv or argv[0] in ("-h", "--help")


def recipe_of(argv: Sequence[str], command: str) -> RunConfig:
    """Return the configuration of the recipe that the first argument names.

    Raises:
        ValueError: unknown recipe, or an option in its place.
    """
    if argv[0].startswith("-"):
        usage = f"multifire {command} RECIPE [--overrides]"
        raise ValueError(f"expected a recipe before {argv[0]}: {usage}; recipes: {', '.join(RECIPES)}")
    return get_recipe(argv[0])


def parse_seeds(text: str) -> list[int]:
    """Return the numbers of a list such as 0,1,2.

    Raises:
        ValueError: not numbers, or one of them twice.
    """
    numbers = [number.strip() for number in text.split(",")]
    if not all(number.isdecimal() for number in numbers) or len(set(map(int, numbers))) < len(numbers):
        raise ValueError(f"seeds is {text!r}, expected different numbers such as 0,1,2")
    return [int(number) for number in numbers]


def _spell_out_resume(args: Sequence[str]) -> list[str]:
    """Replace `--resume` alone by `--resume yes`."""
    spelt = []
    for arg, following in itertools.zip_longest(args, args[1:], fillvalue=""):
        spelt += [arg, "yes"] if arg == "--resume" and following not in ("no", "yes", "auto") else [arg]
    return spelt


def _option_names(value: Any, prefix: str = "") -> list[str]:
    names = []
    for field in dataclasses.fields(value):
        name, inner = prefix + field.name.replace("_", "-"), getattr(value, field.name)
        names += _option_names(inner, f"{name}.") if dataclasses.is_dataclass(inner) else [name]
    return names


def _one_line(box: str, title: str) -> str:
    """Return the message in tyro's box, up to its first rule, as one line."""
    lines = []
    for line in box.splitlines():
        inner = line.strip("│ ")
        if line.startswith(("╭", "╰")):
            continue
        if inner.startswith("──"):
            break
        lines.append(inner)
    return " ".join(lines).removeprefix(f"Error parsing {title}: ") or " ".join(box.split())
