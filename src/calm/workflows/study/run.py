"""Carrying out a plan: what is missing is trained and scored, and all of it reported.

A model that is trained and scored (``score.json``) as the plan says is not done again; with another ``evaluation`` it
is scored again, with another ``fluency`` texts are judged again; where a recipe changed the study says so and stops.
Several processes may work on one study: each takes the next model that can be made and that nobody else works on.
"""

import json
import os
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout
from rich.progress import Progress

from calm.data.blocks import check_block_size
from calm.evaluation.brier_lm import check_scorable
from calm.report.study import PLAN, SCORE, WITHOUT_HEAD, write_report
from calm.training.recipe.cost import recipe_cost
from calm.training.recipe.models import outline_model
from calm.training.recipe.recipe import Recipe
from calm.training.run import train
from calm.training.state.resume import is_complete
from calm.utils.device import release_memory
from calm.utils.files import write_json, write_whole
from calm.workflows.study.plan import Plan
from calm.workflows.study.score import judge_texts, score_run, scored_block_size

_PATIENCE = 2.0  # seconds between looks at what other processes have done


def run_study(
    plan: Plan,
    run: str | os.PathLike,
    overrides: Sequence[str] = (),
    only: Sequence[str] = (),
    progress: Progress | None = None,
) -> Path:
    """Train and score what is missing, and write the report; returns its path.

    Called by several processes at once, it divides the models between them.

    Args:
        overrides: ``dotted.key=value`` for all recipes.
        only: these models and what they are made from; default all.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError(
            "a study is not for torchrun: its models are trained one by one. Start `calm study` several times instead, "
            "on several GPUs each with its own CUDA_VISIBLE_DEVICES; the processes share the work."
        )
    run = Path(run)
    # All at once: a mistake shows before the first run.
    recipes = plan.recipes(run, overrides, only)
    _check_can_be_scored(plan, recipes)
    run.mkdir(parents=True, exist_ok=True)
    task = None if progress is None else progress.add_task("study", total=len(recipes), note="")
    missing = list(recipes)
    while missing := [name for name in missing if not _is_done(plan, recipes[name])]:
        if progress is not None and task is not None:
            progress.update(task, completed=len(recipes) - len(missing))
        ready = (name for name in missing if not set(plan.needs(name)) & set(missing))
        if not any(_make(name, plan, recipes[name], run, progress) for name in ready):
            time.sleep(_PATIENCE)  # other processes are at work on all that could be done
    if progress is not None and task is not None:
        progress.update(task, completed=len(recipes))
    with _lock(run, "report"):
        write_whole(run / PLAN, yaml.safe_dump({"models": plan.models, "report": plan.report}, sort_keys=False))
        if plan.fluency is not None and plan.fluency.needs() <= recipes.keys():
            judge_texts(plan.fluency, run, recipes[plan.fluency.judge], plan.evaluation.seed)
        return write_report(run)


def study_cost(
    plan: Plan, run: str | os.PathLike, overrides: Sequence[str] = (), only: Sequence[str] = ()
) -> dict[str, dict[str, Any]]:
    """What the models of a study cost, by name, counted from their shapes: nothing is trained, only data are needed.

    Each has ``is_done`` and what :func:`~calm.training.recipe.cost.recipe_cost` says of it alone.
    """
    run = Path(run)
    recipes = plan.recipes(run, overrides, only)
    others = list(recipes.values())
    costs = {}
    for name, recipe in recipes.items():
        steps = recipe.training.get("max_steps")
        if steps is None:
            raise ValueError(f"model {name}: what it costs is known for recipes with training.max_steps.")
        is_done = _is_done(plan, recipe)
        costs[name] = {"is_done": is_done} | recipe_cost(recipe, outline_model(recipe, others), steps, others)
    return costs


def _lock(run: Path, name: str) -> FileLock:
    return FileLock(run / f".{name}.lock")


def _is_done(plan: Plan, recipe: Recipe) -> bool:
    """Whether a model is trained as its recipe says and scored as the plan says."""
    path = Path(recipe.output_dir) / SCORE
    if not path.exists() or not is_complete(recipe):
        return False
    score = json.loads(path.read_text())
    is_whole = recipe.stage != "calm" or "token_prediction" in score
    return is_whole and score.get("evaluation") == asdict(plan.evaluation)


def _check_can_be_scored(plan: Plan, recipes: dict[str, Recipe]) -> None:
    others, stride, named = list(recipes.values()), plan.evaluation.stride, plan.named()
    for name, recipe in recipes.items():
        scored_block_size(name, recipe, stride)
        config: Any = outline_model(recipe, others).config
        if recipe.stage != "autoencoder":
            check_scorable(config)
        if recipe.stage != "baseline":
            check_block_size(recipe.data.block_size, config.patch_size)
            if stride % config.patch_size:
                raise ValueError(
                    f"evaluation.stride must be a multiple of the patch size {config.patch_size} of model {name}, got "
                    f"{stride}."
                )
        if plan.fluency is not None and name == plan.fluency.judge and recipe.stage != "baseline":
            raise ValueError(f"fluency.judge must be a token model, whose probabilities are known; {name} is none.")
        if name + WITHOUT_HEAD in named and not getattr(config, "mtp_weight", 0):
            raise ValueError(
                f"the plan's report or fluency names {name + WITHOUT_HEAD}, and {name} has no token prediction: only a "
                "CALM has it whose recipe gives it a model.mtp_weight."
            )


def _make(name: str, plan: Plan, recipe: Recipe, run: Path, progress: Progress | None) -> bool:
    """Train and score one model; False when another process is doing that."""
    try:
        with _lock(run, name).acquire(blocking=False):
            if _is_done(plan, recipe):
                return True
            train(recipe, progress)
            release_memory()
            score = score_run(recipe, plan.evaluation)
            score["evaluation"] = asdict(plan.evaluation)
            # Each of what it was made from once, however many ways lead there.
            before = [other for other in plan.with_needs([name]) if other != name]
            needed = sum(json.loads((run / other / SCORE).read_text())["training_flops"] for other in before)
            score["total_flops"] = score["training_flops"] + needed
            write_json(run / name / SCORE, score)
            release_memory()
    except Timeout:
        return False
    return True
