import os
from pathlib import Path
from typing import Annotated

import typer


def train(
    recipe: Annotated[Path, typer.Argument(help="YAML file; recipes/... of this package are found from anywhere")],
    overrides: Annotated[list[str] | None, typer.Argument(help="dotted.key=value ...")] = None,
    allow_recipe_change: Annotated[
        bool,
        typer.Option(
            "--allow-recipe-change",
            help="go on with a run that another recipe began, of the same stage, model, seed, optimiser and data",
        ),
    ] = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="compare all prepared data with their checksums, not a sample of them")
    ] = False,
) -> None:
    """Train what a recipe says: an autoencoder, a CALM, or an autoregressive baseline.

    Interrupted (SIGTERM, Ctrl-C, a crash), the same command goes on from the last checkpoint. Under torchrun or
    `accelerate launch` it trains on all processes.

    All keys of a recipe: `python -m calm.training.recipe.reference`.

    Example: `calm train recipes/quickstart/calm.yaml training.learning_rate=1e-3 output_dir=runs/mine`
    """
    from calm.training.recipe.recipe import Recipe
    from calm.training.run import train as run
    from calm.training.state.resume import is_complete

    resolved = Recipe.load(recipe, overrides or [])
    already = is_complete(resolved)
    output = run(resolved, allow_recipe_change=allow_recipe_change, verify=verify)
    if int(os.environ.get("RANK", 0)) == 0:
        print(f"{'already complete' if already else 'trained'}: {output}")
