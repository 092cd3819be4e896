"""Recipes: a YAML file in, checked settings, Trainer arguments, models and costs out."""

from calm.training.recipe.recipe import FAMILY, Recipe, find_recipe, read_yaml

__all__ = ["FAMILY", "Recipe", "find_recipe", "read_yaml"]
