"""How good the models of a study are: scores of each, and of the texts that some of them write."""

import json
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from calm.checkpoints.loading import load_language_model, load_model
from calm.data.blocks import TokenBlocks
from calm.data.tokenizer import load_tokenizer
from calm.evaluation.brier_lm import evaluate_brier
from calm.evaluation.compute import compute
from calm.evaluation.generation_quality import evaluate_fluency, fluency_of_text
from calm.evaluation.reconstruction import evaluate_reconstruction
from calm.functional.brier import NGRAM
from calm.report.study import WITHOUT_HEAD, fluency_path
from calm.training.recipe.cost import recipe_cost
from calm.training.recipe.recipe import Recipe
from calm.training.recipe.trainer_arguments import training_arguments
from calm.training.state.resume import read_run
from calm.utils.files import write_json
from calm.workflows.study.plan import Evaluation, Fluency


def score_run(recipe: Recipe, evaluation: Evaluation) -> dict[str, Any]:
    """What the trained model of a recipe cost and how good it is.

    An autoencoder: how much text comes back. A language model: BrierLM, the same of its autoencoder, and BrierLM of its
    token prediction, without the head.
    """
    path = Path(recipe.output_dir)
    _, steps = read_run(path)
    model: Any = load_model(path)
    model.to(training_arguments(recipe).device)  # where it was trained
    patch_size = getattr(model.config, "patch_size", None)
    block_size = scored_block_size(path.name, recipe, evaluation.stride)
    blocks = TokenBlocks(str(recipe.data.validation), block_size, evaluation.stride)
    assert steps is not None
    score = {"stage": recipe.stage, "patch_size": patch_size} | recipe_cost(recipe, model, steps)
    if recipe.stage == "autoencoder":
        return score | evaluate_reconstruction(model, blocks, evaluation.num_blocks).to_dict()
    scored = partial(
        evaluate_brier, model, blocks, evaluation.stride, num_blocks=evaluation.num_blocks,
        num_samples=evaluation.num_samples, seed=evaluation.seed,
    )  # fmt: skip
    score |= scored().to_dict()
    if recipe.stage == "calm":
        rebuilt = evaluate_reconstruction(model.autoencoder, blocks, evaluation.num_blocks)
        score["token_accuracy_sample"] = rebuilt.token_accuracy_sample
        score["token_prediction"] = None
        if model.config.mtp_weight:
            positions = recipe.data.block_size // model.config.patch_size
            cost = compute(model, positions, sampler="mtp").inference_flops_per_token["total"]
            without_head = scored(sampler="mtp").to_dict()
            score["token_prediction"] = without_head | {"inference_flops_per_token": cost}
    return score


def scored_block_size(name: str, recipe: Recipe, stride: int) -> int:
    """Tokens of the blocks that a recipe's model is scored on; ValueError when it cannot be scored."""
    if recipe.data.validation is None:
        raise ValueError(f"model {name}: its recipe needs data.validation, prepared data to be scored on.")
    block_size = recipe.data.block_size // stride * stride
    smallest = stride if recipe.stage == "autoencoder" else -(-NGRAM // stride) * stride + stride
    if block_size < smallest:
        raise ValueError(
            f"model {name}: its data.block_size of {recipe.data.block_size} holds nothing to score at a stride of "
            f"{stride} tokens; it must be at least {smallest}."
        )
    return block_size


def judge_texts(fluency: Fluency, run: Path, judge_recipe: Recipe, seed: int) -> None:
    """Put ``fluency.json`` into the directory of every model, and of the text itself into that of the judge."""
    asked = {key: value for key, value in asdict(fluency).items() if key != "models"} | {"seed": seed}
    text_path = run / "text.json"
    names = [name for name in fluency.models if not _is_judged(fluency_path(run, name), asked)]
    if not names and _is_judged(text_path, asked):
        return
    assert judge_recipe.data.validation is not None
    device: Any = training_arguments(judge_recipe).device
    judge: Any = load_language_model(run / fluency.judge)
    judge.to(device)
    tokenizer = load_tokenizer(run / fluency.judge)
    blocks = TokenBlocks(judge_recipe.data.validation, judge_recipe.data.block_size)
    size = (fluency.num_texts, fluency.prompt_tokens, fluency.new_tokens)
    if not _is_judged(text_path, asked):
        text = fluency_of_text(judge, tokenizer, blocks, *size).to_dict()
        write_json(text_path, text | {"asked": asked})
    for name in names:
        path = fluency_path(run, name)
        model: Any = load_language_model(path.parent)
        model.to(device)
        sampler = "mtp" if name.endswith(WITHOUT_HEAD) else None
        judged = partial(evaluate_fluency, model, judge, tokenizer, blocks, *size, seed=seed, sampler=sampler)
        results = [judged(temperature=temperature).to_dict() for temperature in fluency.temperatures]
        write_json(path, [result | {"asked": asked} for result in results])


def _is_judged(path: Path, asked: dict[str, Any]) -> bool:
    """Whether the texts of a file, a model's or the documents', were judged as the plan says now."""
    if not path.exists():
        return False
    found = json.loads(path.read_text())
    return all(result.get("asked") == asked for result in (found if isinstance(found, list) else [found]))
