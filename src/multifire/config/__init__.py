"""Configurations and recipes. This package imports neither torch nor NumPy, so that help and tables appear at once."""

from multifire.config.recipes import RECIPES, Recipe, get_recipe
from multifire.config.schema import DataConfig, ModelConfig, OptimConfig, RunConfig, TrainOptions

__all__ = [
    "RECIPES",
    "DataConfig",
    "ModelConfig",
    "OptimConfig",
    "Recipe",
    "RunConfig",
    "TrainOptions",
    "get_recipe",
]
