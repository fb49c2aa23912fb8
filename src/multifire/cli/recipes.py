"""multifire recipes: list the recipes."""

import argparse

from multifire.cli.output import print_table
from multifire.config import RECIPES
from multifire.config.architecture import architecture
from multifire.config.parameters import count_parameters


def add_parser(commands) -> None:
    """Add the command to the parser."""
    commands.add_parser("recipes", help="list the recipes").set_defaults(run=recipes)


def recipes(args: argparse.Namespace) -> int:
    """Print the table of recipes."""
    rows = []
    for name, recipe in RECIPES.items():
        cfg = recipe.config
        published = "-" if recipe.published is None else f"{recipe.published:.2f}"
        depth = architecture(cfg.model.name).depth
        figures = (cfg.data.timesteps, depth, cfg.model.width, f"{count_parameters(cfg.model):,}", published)
        rows.append([name, cfg.data.name, *map(str, figures)])
    head = ["recipe", "data", "T", "depth", "width", "parameters", "paper %"]
    print_table(head, rows, title="multifire train RECIPE", text_columns=2)
    return 0
