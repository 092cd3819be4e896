"""One training run: build the model a recipe asks for, train it (or go on training), leave a complete directory."""

import json
import os
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.progress import Progress
from transformers import (
    PreTrainedModel,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_callback import ProgressCallback as TqdmCallback

from calm.data.blocks import TokenBlocks
from calm.data.tokenizer import load_tokenizer
from calm.files import write_whole
from calm.training.models import build_model
from calm.training.progress import ProgressCallback, make_progress
from calm.training.recipe import Recipe
from calm.training.trainer import CalmTrainer, JsonlCallback

RECIPE = "recipe.yaml"
COMPLETE = "complete.json"


def train(recipe: Recipe, progress: Progress | None = None) -> Path:
    """Carry a recipe out. Interrupted, the same call goes on from the last checkpoint; complete, it returns at once.

    Returns:
        the output directory: model, tokenizer, ``recipe.yaml``, ``metrics.jsonl``, ``tensorboard/``, ``checkpoints/``.

    Raises:
        ValueError: when the directory holds a run of another recipe, or the recipe's parts do not fit together.
    """
    output = Path(recipe.output_dir)
    if is_complete(recipe):
        return output
    check_output(recipe)
    set_seed(recipe.seed)
    model = build_model(recipe)
    train_blocks, validation_blocks = load_blocks(recipe, model)

    output.mkdir(parents=True, exist_ok=True)
    if not (output / RECIPE).exists():
        write_whole(output / RECIPE, recipe.to_yaml())
    arguments = training_arguments(recipe)
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(output / "tensorboard")  # the one way the Trainer offers
    trainer = CalmTrainer(
        model=model,
        args=arguments,
        train_dataset=train_blocks,
        eval_dataset=validation_blocks,
        callbacks=[JsonlCallback(output / "metrics.jsonl"), MarkCompleteCallback()],
        brier_blocks=recipe.brier_blocks,
    )
    trainer.remove_callback(TqdmCallback)
    trainer.remove_callback(PrinterCallback)
    own_progress = progress is None
    progress = progress or make_progress()
    trainer.add_callback(ProgressCallback(progress, f"train {recipe.stage}"))
    if own_progress:
        progress.start()
    try:
        _train_to_the_end(trainer, last_checkpoint(output))
    finally:
        if own_progress:
            progress.stop()
    trainer.accelerator.unwrap_model(trainer.model).save_pretrained(output)
    load_tokenizer(recipe.data.train).save_pretrained(output)
    write_whole(output / COMPLETE, lambda path: trainer.state.save_to_json(str(path)))
    return output


def _train_to_the_end(trainer: CalmTrainer, checkpoint: str | None) -> None:
    if checkpoint is not None:
        state = TrainerState.load_from_json(str(Path(checkpoint) / "trainer_state.json"))
        if state.global_step >= state.max_steps:
            # The kill fell behind the last step; the Trainer, asked to go on, would take one step too many.
            trainer._load_from_checkpoint(checkpoint)
            trainer.state = state
            return
    trainer.train(resume_from_checkpoint=checkpoint)


def is_complete(recipe: Recipe) -> bool:
    """Whether the recipe's directory holds its finished run."""
    output = Path(recipe.output_dir)
    return (output / COMPLETE).exists() and (output / RECIPE).read_text(encoding="utf-8") == recipe.to_yaml()


def check_output(recipe: Recipe) -> None:
    """ValueError when the output directory holds something else than (part of) this recipe's run."""
    output = Path(recipe.output_dir)
    if not output.exists() or not any(output.iterdir()):
        return
    if not (output / RECIPE).exists():
        raise ValueError(f"{output} is not empty and holds no training run: choose another output_dir.")
    before = _flatten(yaml.safe_load((output / RECIPE).read_text(encoding="utf-8")))
    now = _flatten(yaml.safe_load(recipe.to_yaml()))
    different = [
        f"{key} ({before.get(key)!r} there, {now.get(key)!r} here)"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key)
    ]
    if different:
        raise ValueError(
            f"{output} holds a run of another recipe: {'; '.join(different)}. Choose another output_dir, or remove it."
        )


def _flatten(values: dict, prefix: str = "") -> dict:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict) and value:
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


class MarkCompleteCallback(TrainerCallback):
    """Leaves a mark in every checkpoint that was written to its end."""

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        if state.is_world_process_zero:
            Path(str(args.output_dir), f"checkpoint-{state.global_step}", COMPLETE).touch()


def last_checkpoint(output: Path) -> str | None:
    """The newest complete checkpoint of a run; one that a kill cut short is as good as not there."""
    checkpoints = [path for path in (output / "checkpoints").glob("checkpoint-*") if (path / COMPLETE).exists()]
    return str(max(checkpoints, key=lambda path: int(path.name.split("-")[1]))) if checkpoints else None


def load_blocks(recipe: Recipe, model: PreTrainedModel) -> tuple[TokenBlocks, TokenBlocks | None]:
    """Training and validation blocks; ValueError when they do not fit the model or each other."""
    patch_size = getattr(model.config, "patch_size", 1)
    blocks = TokenBlocks(recipe.data.train, recipe.data.block_size, patch_size)
    if blocks.manifest["vocab_size"] > model.config.vocab_size:
        raise ValueError(
            f"{recipe.data.train} was prepared with {blocks.manifest['vocab_size']} tokens, the model knows "
            f"{model.config.vocab_size}: prepare it with the model's tokenizer."
        )
    if recipe.data.validation is None:
        return blocks, None
    validation = TokenBlocks(recipe.data.validation, recipe.data.block_size, patch_size)
    if validation.manifest["tokenizer_sha256"] != blocks.manifest["tokenizer_sha256"]:
        raise ValueError(
            f"{recipe.data.train} and {recipe.data.validation} were prepared with different tokenizers: run "
            "`calm prepare` for both with one."
        )
    return blocks, validation


def accumulation_steps(recipe: Recipe, num_processes: int) -> int:
    """Micro-batches of a step, so that all processes together see ``tokens_per_step`` tokens in it."""
    assert recipe.tokens_per_step is not None
    at_once = recipe.data.block_size * recipe.training.get("per_device_train_batch_size", 8) * num_processes
    if recipe.tokens_per_step % at_once:
        raise ValueError(
            f"tokens_per_step ({recipe.tokens_per_step}) must be a multiple of the {at_once} tokens that "
            f"{num_processes} process(es) take at once: change training.per_device_train_batch_size or tokens_per_step."
        )
    return recipe.tokens_per_step // at_once


def trained_tokens(recipe: Recipe, steps: int | None) -> int | None:
    """Tokens that so many steps of a recipe read (in one process, unless it says ``tokens_per_step``)."""
    if steps is None or steps < 0:
        return None
    if recipe.tokens_per_step is not None:
        return steps * recipe.tokens_per_step
    sequences = recipe.training.get("per_device_train_batch_size", 8) * recipe.training.get(
        "gradient_accumulation_steps", 1
    )
    return steps * sequences * recipe.data.block_size


def read_run(output: Path) -> tuple[Recipe | None, int | None]:
    """The recipe of a finished run and the steps it took; (None, None) where a directory holds none."""
    if not (output / RECIPE).is_file() or not (output / COMPLETE).is_file():
        return None, None
    state = json.loads((output / COMPLETE).read_text(encoding="utf-8"))
    return Recipe.load(output / RECIPE), state["global_step"]


def training_arguments(recipe: Recipe) -> TrainingArguments:
    """The Trainer's arguments: the recipe's, and what the run decides itself."""
    values = dict(recipe.training)
    if recipe.tokens_per_step is not None:
        values["gradient_accumulation_steps"] = accumulation_steps(recipe, int(os.environ.get("WORLD_SIZE", 1)))
    if "bf16" not in values and "fp16" not in values and not values.get("use_cpu"):
        # bf16 on CPUs without native support is over a hundred times slower than float32.
        values["bf16"] = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    if recipe.data.validation is None:
        if values.get("eval_strategy", "no") != "no":
            raise ValueError("training.eval_strategy needs data.validation: prepared data to evaluate on.")
    elif "eval_strategy" not in values:
        values |= {"eval_strategy": "steps", "eval_steps": values.get("eval_steps", values["save_steps"])}
    return TrainingArguments(
        output_dir=str(Path(recipe.output_dir) / "checkpoints"),
        seed=recipe.seed,
        remove_unused_columns=False,
        prediction_loss_only=True,
        **values,
    )
