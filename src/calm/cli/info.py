from pathlib import Path
from typing import Annotated

import typer

from calm.generation.sampling_params import DEFAULTS, SamplingParams


def info(
    source: Annotated[str, typer.Argument(help="a recipe (.yaml), or a directory or hub id of a model")],
    overrides: Annotated[list[str] | None, typer.Argument(help="dotted.key=value, for recipes")] = None,
    temperature: Annotated[float, typer.Option(help="of generation; below 1, candidates are sampled")] = 1.0,
    num_candidates: Annotated[int, typer.Option(min=1, help="samples per patch at temperatures below 1")] = DEFAULTS[
        "num_candidates"
    ],
    sampler: Annotated[
        str, typer.Option(help="of a CALM's generation; mtp does not use head and autoencoder")
    ] = "batch",
    context: Annotated[
        int, typer.Option(min=1, help="positions a step of generation attends to: patches of a CALM, tokens otherwise")
    ] = 2048,
    tokens: Annotated[
        float | None, typer.Option(help="tokens of the training; default the recipe's, or the run's")
    ] = None,
    vocab_size: Annotated[
        int | None, typer.Option(min=1, help="of recipes that name none and whose data are not prepared yet")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Parameters and FLOPs of a model, by part, from its shapes alone: no weights are allocated, no data read.

    A recipe's vocabulary is that of its data, or the `--vocab-size` where there are none yet.

    Example: `calm info recipes/paper/calm_m.yaml --temperature 0.5 --num-candidates 200`
    """
    import json

    from calm.checkpoints.meta_model import outline
    from calm.data.blocks import MANIFEST
    from calm.evaluation.compute import compute
    from calm.generation.samplers import find_sampler
    from calm.models.modeling_calm import CalmForCausalLM
    from calm.report.tables import compute_tables
    from calm.training.recipe.cost import training_flops_per_token
    from calm.training.recipe.models import outline_model
    from calm.training.recipe.recipe import Recipe, find_recipe
    from calm.training.recipe.trainer_arguments import trained_tokens

    params = SamplingParams(temperature, sampler, num_candidates)
    sampler = str(params.sampler)
    recipe, steps, beside = None, None, []
    if source.endswith((".yaml", ".yml")):
        recipe = Recipe.load(source, overrides or [])
        steps = recipe.training.get("max_steps")
        beside = [recipe, *_recipes_beside(find_recipe(source))]
        for each in beside:
            if vocab_size is not None and not (Path(each.data.train) / MANIFEST).is_file():
                each.set_vocab_size(vocab_size)
        model = outline_model(recipe, beside)
    elif overrides or vocab_size is not None:
        raise ValueError(f"overrides and --vocab-size are for recipes, {source} is a model.")
    else:
        from calm.training.state.resume import read_run

        model = outline(source)
        recipe, steps = read_run(Path(source))
    planned = trained_tokens(recipe, steps) if recipe is not None else None
    if isinstance(model, CalmForCausalLM):
        model.check_sampling(params)
    cost = compute(model, context, temperature, num_candidates, sampler=sampler)
    per_token = cost.training_flops_per_token
    if recipe is not None:
        per_token = training_flops_per_token(recipe, model, beside)
    training_tokens = tokens if tokens is not None else planned
    document = {
        "source": source,
        "parameters": cost.parameters,
        "training_tokens": training_tokens,
        "training_flops_per_token": per_token,
        "training_flops": per_token * training_tokens if training_tokens is not None else None,
        "inference_flops_per_token": cost.inference_flops_per_token,
        "temperature": temperature,
        "sampler": sampler,
        "candidates": max(1, find_sampler(sampler).num_head_samples(params)),
        "context": context,
    }
    if as_json:
        print(json.dumps(document, indent=1))
        return
    from rich.console import Console

    for table in compute_tables(document):
        Console().print(table)


def _recipes_beside(path: Path) -> list:
    """The recipes in the same directory; other files are none of ours."""
    from calm.training.recipe.recipe import Recipe

    recipes = []
    for other in sorted(path.parent.glob("*.yaml")):
        try:
            recipes.append(Recipe.load(other))
        except ValueError:
            continue
    return recipes
