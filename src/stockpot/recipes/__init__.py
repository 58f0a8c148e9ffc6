"""Recipes: intent only. Parsing knows no methods and opens no checkpoints."""

from stockpot.recipes.parsing import load_as_mergekit, load_recipe, parse_recipe
from stockpot.recipes.schema import Recipe

__all__ = ["Recipe", "load_as_mergekit", "load_recipe", "parse_recipe"]
