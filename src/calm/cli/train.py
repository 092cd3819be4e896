from pathlib import Path
from typing import Annotated

import typer


def train(
    recipe: Annotated[Path, typer.Argument(help="YAML file, see recipes/")],
    overrides: Annotated[list[str] | None, typer.Argument(help="dotted.key=value ...")] = None,
) -> None:
    """Train what a recipe says: an autoencoder, a CALM, or an autoregressive baseline.

    Interrupted, the same command goes on from the last checkpoint.

    Example: `calm train recipes/quickstart/calm.yaml training.learning_rate=1e-3 output_dir=runs/mine`
    """
    from calm.training.recipe import Recipe
    from calm.training.run import is_complete
    from calm.training.run import train as run

    resolved = Recipe.load(recipe, overrides or [])
    already = is_complete(resolved)
    output = run(resolved)
    print(f"{'already complete' if already else 'trained'}: {output}")
