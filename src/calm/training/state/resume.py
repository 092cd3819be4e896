"""What an output directory holds already, and whether this run may go on with it."""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from safetensors import SafetensorError, safe_open
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from calm.data.blocks import MANIFEST
from calm.training.recipe.checks import with_current_keys
from calm.training.recipe.recipe import Recipe
from calm.training.state.checkpoint_manifest import find_checkpoint, read_seal, remove_unsealed

if TYPE_CHECKING:  # `calm info` reads runs without importing the Trainer
    from calm.training.loop.trainer import CalmTrainer

RECIPE = "recipe.yaml"
COMPLETE = "complete.json"
LOCK = ".lock"  # held by the process that trains here
_NEVER_CHANGES = ("stage", "model", "seed", "training.optim")
# A recipe may name them by another path, and a run with what it is made from may be moved.
_PATHS = ("data.train", "data.validation", "model.autoencoder", "model.backbone_weights", "model.pretrained")
_UNLIKE_OTHERS = "reduce_lr_on_plateau"  # the one schedule whose state means nothing to another


def is_complete(recipe: Recipe) -> bool:
    """Whether the recipe's directory holds its finished run, with the model."""
    output = Path(recipe.output_dir)
    return (output / COMPLETE).exists() and not _differences(output, recipe) and _has_model(output)


def _has_model(output: Path) -> bool:
    """Whether the weights of a finished run are there; their last checkpoint restores them otherwise."""
    index, names = output / SAFE_WEIGHTS_INDEX_NAME, {SAFE_WEIGHTS_NAME}
    try:
        if index.is_file():
            names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        for name in names:
            with safe_open(output / name, "pt"):  # reads the header, and compares the sizes
                pass
    except (OSError, ValueError, LookupError, TypeError, AttributeError, SafetensorError):
        return False
    return (output / CONFIG_NAME).is_file()


def check_output(recipe: Recipe, allow_recipe_change: bool = False) -> None:
    """ValueError when the output directory holds something else than (part of) this recipe's run."""
    output = Path(recipe.output_dir)
    if output.exists() and not output.is_dir():
        raise ValueError(f"output_dir {output} is a file: choose a directory.")
    # Empty directories and a lock are what a run leaves that was refused before its first step.
    if not any(path.is_file() and path.name != LOCK for path in output.rglob("*")):
        return
    if not (output / RECIPE).exists():
        raise ValueError(f"{output} is not empty and holds no training run: choose another output_dir.")
    changed = _differences(output, recipe)
    fixed = [key for key in changed if f"{key}.".startswith(tuple(f"{each}." for each in _NEVER_CHANGES))]
    schedule = "training.lr_scheduler_type"
    if schedule in changed and _UNLIKE_OTHERS in changed[schedule]:
        fixed.append(schedule)
    if changed and (fixed or not allow_recipe_change):
        difference = "; ".join(f"{key} ({there!r} there, {here!r} here)" for key, (there, here) in changed.items())
        remedy = "Choose another output_dir (in a study, another name or -o), or remove it"
        if not fixed:
            remedy += ", or go on with the new recipe: `calm train --allow-recipe-change`"
        raise ValueError(f"{output} holds a run of another recipe: {difference}. {remedy}.")


def _differences(output: Path, recipe: Recipe) -> dict[str, tuple[Any, Any]]:
    """What a recipe says otherwise than the one in its directory: that one's values and its own, by dotted key."""
    before = _flatten(with_current_keys(yaml.safe_load((output / RECIPE).read_text(encoding="utf-8")), warn=False))
    now = _flatten(yaml.safe_load(recipe.to_yaml()))
    places = before.pop("output_dir"), now.pop("output_dir")
    values = {key: (before.get(key), now.get(key)) for key in sorted(before.keys() | now.keys())}
    return {
        key: (there, here)
        for key, (there, here) in values.items()
        if there != here and not (key in _PATHS and there and here and _is_same_path(there, here, *places))
    }


def _is_same_path(there: str, here: str, place_there: str, place_here: str) -> bool:
    """Whether two runs name the same directory, or one that was moved along: it lies beside each of them in the same
    way, and nothing lies where it was. (Where something does, this may be a copy beside another model.)"""
    if os.path.realpath(there) == os.path.realpath(here):
        return True
    return not os.path.exists(there) and os.path.relpath(there, place_there) == os.path.relpath(here, place_here)


def _flatten(values: dict, prefix: str = "") -> dict:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict) and value:
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def read_run(output: Path) -> tuple[Recipe | None, int | None]:
    """The recipe of a finished run and the steps it took; (None, None) where a directory holds none."""
    if not (output / RECIPE).is_file() or not (output / COMPLETE).is_file():
        return None, None
    state = json.loads((output / COMPLETE).read_text(encoding="utf-8"))
    return Recipe.load(output / RECIPE), state["global_step"]


def checkpoint_to_resume(trainer: "CalmTrainer", recipe: Recipe, say: Callable[[str], object]) -> Path | None:
    """The newest whole checkpoint, the same for all processes; ValueError when it does not fit this run."""
    from accelerate.utils import broadcast_object_list

    folder = Path(recipe.output_dir) / "checkpoints"
    found: list[Any] = [None]
    if trainer.is_world_process_zero():
        try:
            remove_unsealed(folder)
            checkpoint, complaints = find_checkpoint(folder, ("data", "blocks_per_step", "num_processes"))
            for complaint in complaints:
                say(f"{complaint}: going on from {checkpoint}")
            if checkpoint is not None:
                _check_fits(trainer, recipe, checkpoint, say)
            found = [checkpoint]
        except ValueError as error:
            found = [error]
    (result,) = broadcast_object_list(found)
    if isinstance(result, ValueError):
        raise result
    return result


def _check_fits(trainer: "CalmTrainer", recipe: Recipe, checkpoint: Path, say: Callable[[str], object]) -> None:
    from calm.training.loop.trainer import blocks_per_step

    before = read_seal(checkpoint)
    data = trainer.about["data"]
    if before["data"] != data:
        changed = [name for name, value in data.items() if before["data"].get(name) != value]
        raise ValueError(
            f"the prepared data changed since {checkpoint} was written (data.{', data.'.join(changed)}): restore them, "
            "or train in another output_dir."
        )
    now = blocks_per_step(trainer.args)
    if before["blocks_per_step"] != now:
        raise ValueError(
            f"{checkpoint} was trained by {before['num_processes']} process(es) on {before['blocks_per_step']} blocks "
            f"a step; {trainer.args.world_size} process(es) would take {now}. Set tokens_per_step to "
            f"{before['blocks_per_step'] * recipe.data.block_size}, or start as many processes as before."
        )
    if before["num_processes"] != trainer.args.world_size:
        say(
            f"going on with {trainer.args.world_size} process(es) instead of {before['num_processes']}: the same "
            "steps, summed in another order"
        )


def data_fingerprint(recipe: Recipe) -> dict[str, str]:
    """What tells prepared data from others, for each split."""
    splits = {"train": recipe.data.train, "validation": recipe.data.validation}
    return {
        name: hashlib.sha256((Path(path) / MANIFEST).read_bytes()).hexdigest() for name, path in splits.items() if path
    }
