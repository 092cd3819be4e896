"""From a recipe to the Trainer's arguments, and the sizes that follow from them."""

import os
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from calm.functional.brier import NGRAM
from calm.training.recipe.recipe import Recipe

_LOADER_WORKERS = 2  # blocks are read from a memory map: two processes keep up with a GPU
_FEWEST_COMPILED_STEPS = 1000  # compilation takes about a minute
_TIMEOUT_SECONDS = 2 * 60 * 60


def training_arguments(recipe: Recipe) -> TrainingArguments:
    """The Trainer's arguments: the recipe's, and what the run decides itself."""
    # Every weight that is trained has a part in every loss: no process need look for those that have none.
    # The other processes wait while the first one scores and writes checkpoints.
    values = {"ddp_find_unused_parameters": False, "ddp_timeout": _TIMEOUT_SECONDS} | recipe.training
    values["report_to"] = values["report_to"] or "none"
    # Without it, processes started together on a machine without an accelerator would each take themselves for alone.
    values.setdefault("use_cpu", not torch.accelerator.is_available())
    if recipe.tokens_per_step is not None:
        values["gradient_accumulation_steps"] = accumulation_steps(recipe, int(os.environ.get("WORLD_SIZE", 1)))
    if recipe.precision != "auto":
        values |= {"bf16": recipe.precision == "bfloat16", "fp16": recipe.precision == "float16"}
    elif "bf16" not in values and "fp16" not in values and not values.get("use_cpu"):
        # Where bf16 is not native it is slow: on a CPU over a hundred times slower than float32.
        values["bf16"] = torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    if torch.cuda.is_available() and not values["use_cpu"]:
        values = gpu_defaults(recipe, values)
    _check_launcher(values)
    if recipe.data.validation is None:
        if values.get("eval_strategy", "no") != "no":
            raise ValueError("training.eval_strategy needs data.validation: prepared data to evaluate on.")
    elif "eval_strategy" not in values:
        values |= {"eval_strategy": "steps", "eval_steps": values.get("eval_steps", values["save_steps"])}
    if recipe.brier_blocks is not None and values["eval_strategy"] == "no":
        raise ValueError(
            "brier_blocks scores with every evaluation, and training.eval_strategy is no: add "
            "training.eval_strategy=steps training.eval_steps=500, or leave brier_blocks out."
        )
    _check_metric(recipe)
    try:
        arguments = TrainingArguments(
            output_dir=str(Path(recipe.output_dir) / "checkpoints"),
            seed=recipe.seed,
            remove_unused_columns=False,
            prediction_loss_only=True,
            logging_nan_inf_filter=False,  # such a loss ends the run
            **values | {"save_total_limit": None},  # a checkpoint goes when a newer one is sealed
        )
    except (TypeError, AttributeError, LookupError) as error:  # what transformers raises for a value of another type
        raise ValueError(
            f"the settings in training do not fit transformers: {type(error).__name__}: {error}"
        ) from error
    # Several GPUs are for several processes: one process would spread its batch over them by threads (DataParallel).
    arguments._n_gpu = min(1, arguments.n_gpu)
    return arguments


def gpu_defaults(recipe: Recipe, values: dict[str, Any]) -> dict[str, Any]:
    """Add the Trainer's arguments that a recipe leaves to the device, for a GPU.

    - Data loader workers, pinned memory and non-blocking copies: the device does not wait for its next batch.
    - ``torch_compile`` for runs that are long enough to repay the compilation, except where FSDP divides the model.
    - No TF32: float32 means float32. Products of a bfloat16 run do not use it, and the energy score must not.

    Raises:
        ValueError: for ``tf32`` in a compiled run, whose energy score would be computed with it.
    """
    defaults: dict[str, Any] = {
        "dataloader_num_workers": _LOADER_WORKERS,
        "dataloader_pin_memory": True,
        "accelerator_config": {"non_blocking": True},
        "torch_compile": not _asks_for_fsdp(values) and not 0 < values.get("max_steps", -1) < _FEWEST_COMPILED_STEPS,
        "tf32": False,
    }
    values = defaults | values
    if values["dataloader_num_workers"]:
        values.setdefault("dataloader_persistent_workers", True)
    if values["tf32"] and values["torch_compile"]:
        raise ValueError(
            "training.tf32 cannot be used with training.torch_compile: a compiled energy score would lose the accuracy "
            "of its distances. Use precision: bfloat16, or training.torch_compile=false."
        )
    return values


def _check_launcher(values: dict[str, Any]) -> None:
    """ValueError where the launcher asks for a precision that the run would not heed, or would silently take."""
    asked = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    own = "bf16" if values.get("bf16") else "fp16" if values.get("fp16") else "no"
    if asked not in ("no", own):
        raise ValueError(
            f"the launcher asks for mixed precision {asked}, and the recipe for {own}: leave it to the recipe "
            "(`accelerate launch --mixed_precision no`), and set the recipe's precision (float32, bfloat16, float16)."
        )


def _check_metric(recipe: Recipe) -> None:
    """ValueError where the best checkpoint is to be told by something that no evaluation measures."""
    metric = recipe.training.get("metric_for_best_model")
    known = ["loss"] + ["brier_lm", *(f"brier_{n}" for n in range(1, NGRAM + 1))] * (recipe.brier_blocks is not None)
    if metric is not None and str(metric).removeprefix("eval_") not in known:
        raise ValueError(
            f"training.metric_for_best_model must be one of {', '.join(known)}, got {metric!r}"
            + ("." if recipe.brier_blocks else "; the recipe's brier_blocks would add BrierLM.")
        )


def check_processes(recipe: Recipe, arguments: TrainingArguments) -> None:
    """ValueError when the way the processes were started does not fit them or the recipe."""
    fsdp = asks_for_fsdp(arguments)
    if fsdp and recipe.brier_blocks is not None:
        raise ValueError(
            "brier_blocks cannot be scored while the model is sharded: leave it out, and run `calm evaluate` on the "
            "trained model."
        )
    if fsdp and arguments.world_size == 1:
        raise ValueError(
            "FSDP shards a model over processes, and this is one process: start several with `torchrun "
            "--nproc-per-node 2 --no-python calm train ...` or `accelerate launch`, or train without FSDP."
        )


def asks_for_fsdp(arguments: TrainingArguments) -> bool:
    """Whether the recipe (``training.fsdp``) or `accelerate launch` asks for a sharded model."""
    return _asks_for_fsdp({"fsdp": arguments.fsdp})


def _asks_for_fsdp(values: dict[str, Any]) -> bool:
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() in ("1", "true") or bool(values.get("fsdp"))


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
