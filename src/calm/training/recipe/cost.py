"""What a recipe costs: tokens and floating-point operations of its training, and of its model afterwards."""

from collections.abc import Iterable
from typing import Any

from transformers import PreTrainedModel

from calm.evaluation.compute import compute
from calm.models.context import patch_size_of
from calm.training.recipe.models import outline_at
from calm.training.recipe.recipe import Recipe
from calm.training.recipe.sections import CalmModel, FineTunedModel
from calm.training.recipe.trainer_arguments import trained_tokens


def training_flops_per_token(recipe: Recipe, model: PreTrainedModel, others: Iterable[Recipe] = ()) -> float:
    """Return the FLOPs of a recipe's training, per token.

    Args:
        model: the recipe's; an outline without weights will do.
        others: recipes that will train what this one builds on, where it is not trained yet.
    """
    positions = recipe.data.block_size // patch_size_of(model.config)
    return compute(model, positions, frozen=_frozen(recipe, others)).training_flops_per_token


def _frozen(recipe: Recipe, others: Iterable[Recipe]) -> tuple[str, ...]:
    section = recipe.model
    if not isinstance(section, CalmModel | FineTunedModel) or not section.freeze_backbone:
        return ()
    path = section.pretrained if isinstance(section, FineTunedModel) else section.backbone_weights
    try:
        source: Any = outline_at(str(path), others)
    except ValueError:  # it is gone
        return ("backbone", "token_predictor")
    return ("backbone", "token_predictor") if getattr(source.config, "mtp_weight", 0) else ("backbone",)


def recipe_cost(recipe: Recipe, model: PreTrainedModel, steps: int, others: Iterable[Recipe] = ()) -> dict[str, Any]:
    """Costs of so many steps: ``parameters`` (without those of a CALM's autoencoder), ``tokens``, ``training_flops``
    and ``inference_flops_per_token``. Arguments as in :func:`training_flops_per_token`."""
    positions = recipe.data.block_size // patch_size_of(model.config)
    cost, tokens = compute(model, positions), trained_tokens(recipe, steps)
    assert tokens is not None
    return {
        "parameters": cost.parameters["language_model"] or cost.parameters["autoencoder"],
        "tokens": tokens,
        "training_flops": training_flops_per_token(recipe, model, others) * tokens,
        "inference_flops_per_token": cost.inference_flops_per_token["total"],
    }
