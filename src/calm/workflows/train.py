"""``calm.train``: one training run from Python."""

import os
from pathlib import Path

from calm.training.recipe.recipe import Recipe
from calm.training.run import train as train_recipe


def train(
    recipe: Recipe | str | os.PathLike, *overrides: str, allow_recipe_change: bool = False, verify: bool = False
) -> Path:
    """Train the model of a recipe; an interrupted run resumes, and a complete one returns at once.

    Args:
        recipe: a recipe, or the path of its YAML file; ``recipes/...`` of this package are found from any directory.
        overrides: ``"dotted.key=value"``, as on the command line.
        allow_recipe_change: whether to resume a run that another recipe of the same stage, model, seed, optimiser and
            data began.
        verify: whether to compare all prepared data with their checksums; by default a sample of them.

    Returns:
        the output directory with model and tokenizer, which :func:`calm.load` loads.

    Raises:
        ValueError: when a key is unknown or does not fit, the directory has a run of another recipe, or training fails.
    """
    if not isinstance(recipe, Recipe):
        recipe = Recipe.load(recipe, overrides)
    elif overrides:
        raise ValueError("overrides are for the path of a recipe; change the fields of a Recipe before you train it.")
    return train_recipe(recipe, allow_recipe_change=allow_recipe_change, verify=verify)
