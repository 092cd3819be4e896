"""Semantic bandwidth as an axis: one family of recipes, trained and scored for several K and as a token model.

It is a study whose plan follows from the family and the K.
"""

import math
import os
from collections.abc import Sequence
from typing import Any

from calm.training.recipe.recipe import FAMILY, find_recipe, read_yaml
from calm.training.recipe.sections import is_codes
from calm.workflows.study import Evaluation, Plan

RECIPES = ("calm", "baseline")


def bandwidth_plan(
    family: str | os.PathLike,
    patch_sizes: Sequence[int],
    num_blocks: int | None = None,
    num_samples: int = 8,
    seed: int = 0,
) -> Plan:
    """The plan that trains and scores a family for every K; all on the n-grams that start where patches of every K do.

    Args:
        family: directory with ``calm.yaml``, ``baseline.yaml`` and, unless the CALM has token codes,
            ``autoencoder.yaml``; ``recipes/...`` is one of this package where the working directory has none of that
            name.
        patch_sizes: the K; each has an autoencoder of its own.
        num_blocks, num_samples: of :class:`~calm.workflows.study.plan.Evaluation`.
        seed: of training and draws.
    """
    family, patch_sizes = find_recipe(family, FAMILY), sorted(set(patch_sizes))
    for name in RECIPES:
        if not (family / f"{name}.yaml").is_file():
            raise ValueError(f"no {name}.yaml in {family}: a family of recipes has {' and '.join(RECIPES)}.")
    has_codes = is_codes(read_yaml(family / "calm.yaml").get("model") or {})
    if not has_codes and not (family / "autoencoder.yaml").is_file():
        raise ValueError(
            f"no autoencoder.yaml in {family}: a family of recipes has one, unless its CALM has token codes "
            "(model.autoencoder: {type: codes, ...})."
        )
    if not patch_sizes or patch_sizes[0] < 1:
        raise ValueError(f"patch sizes must be at least 1, got {patch_sizes}.")
    models: dict[str, dict] = {"baseline": {"label": "token model", "recipe": "baseline.yaml"}}
    for patch_size in patch_sizes:
        settings: dict[str, Any] = {"model.autoencoder.patch_size": patch_size}
        if not has_codes:
            models[f"autoencoder_k{patch_size}"] = {
                "label": f"autoencoder, K = {patch_size}",
                "recipe": "autoencoder.yaml",
                "set": {"model.patch_size": patch_size},
            }
            settings = {"model.autoencoder": f"@autoencoder_k{patch_size}"}
        models[f"calm_k{patch_size}"] = {"label": f"CALM, K = {patch_size}", "recipe": "calm.yaml", "set": settings}
    autoencoders = [name for name in models if name.startswith("autoencoder")]
    lines = {"CALM": [f"calm_k{patch_size}" for patch_size in patch_sizes], "token model": ["baseline"]}
    return Plan(
        folder=family,
        models=models,
        evaluation=Evaluation(math.lcm(*patch_sizes), num_blocks, num_samples, seed),
        set={"seed": seed},
        report=[
            {"title": "Semantic bandwidth", "lines": lines},
            *([{"title": "Autoencoders", "rows": autoencoders}] if autoencoders else []),
        ],
    )
