"""One training run: build the model a recipe asks for, train it (or go on training), leave a complete directory."""

import math
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.utils import broadcast_object_list
from rich.progress import Progress
from transformers import PreTrainedModel, TrainerCallback, TrainerState, TrainingArguments, set_seed
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_callback import ProgressCallback as TqdmCallback

from calm.data.blocks import TokenBlocks, read_manifest
from calm.data.checksums import check_checksums
from calm.data.conversations import ConversationBlocks
from calm.data.tokenizer import load_tokenizer
from calm.evaluation.brier_lm import check_scorable
from calm.functional.tiles import is_out_of_memory
from calm.models.context import patch_size_of
from calm.training.loop.interruption import InterruptionCallback, TrainingInterruptedError
from calm.training.loop.metrics_log import JsonlCallback
from calm.training.loop.trainer import CalmTrainer
from calm.training.recipe.models import build_model
from calm.training.recipe.recipe import Recipe
from calm.training.recipe.trainer_arguments import check_processes, training_arguments
from calm.training.state.data_order import NumberedBlocks
from calm.training.state.resume import (
    COMPLETE,
    LOCK,
    RECIPE,
    check_output,
    checkpoint_to_resume,
    data_fingerprint,
    is_complete,
)
from calm.utils.files import hold_lock, write_whole
from calm.utils.progress import ProgressCallback, make_progress

Blocks = TokenBlocks | ConversationBlocks


def train(
    recipe: Recipe,
    progress: Progress | None = None,
    allow_recipe_change: bool = False,
    verify: bool = False,
    progress_callback: ProgressCallback | None = None,
) -> Path:
    """Carry a recipe out. Interrupted, the same call goes on from the last checkpoint; complete, it returns at once.

    Under torchrun or `accelerate launch` all processes call it; the result is that of one process on the same steps.

    Args:
        allow_recipe_change: go on with a run that another recipe began (more steps, another learning rate).
        verify: compare all prepared data with their checksums; by default a sample of them.
        progress_callback: shows the steps in the place of a task "train STAGE" of ``progress``.

    Returns:
        the output directory: model, tokenizer, ``recipe.yaml``, ``metrics.jsonl``, ``tensorboard/``, ``checkpoints/``.

    Raises:
        ValueError: when the directory holds a run of another recipe or somebody else trains in it, the recipe's parts
            do not fit together, the loss is not finite, or memory does not suffice.
        TrainingInterruptedError: after SIGTERM or Ctrl-C, when the checkpoint is written.
    """
    output = Path(recipe.output_dir)
    if is_complete(recipe):
        return output
    check_output(recipe, allow_recipe_change)
    try:
        arguments = training_arguments(recipe)
        check_processes(recipe, arguments)
        trainer = _make_trainer(recipe, arguments)
        with _alone_in(output, arguments, partial(_check_start, recipe, allow_recipe_change, verify)):
            _run(trainer, recipe, progress, progress_callback)
    except (ImportError, RuntimeError) as error:
        if _is_lost_connection(error):
            raise ConnectionError(
                f"another process of this run ended early, and this one cannot continue alone ({error!s:.150}). "
                "The output of that process has the reason; the same command resumes from the last checkpoint."
            ) from error
        # transformers and accelerate ask for what a setting needs in many words, and with either error.
        if "instal" not in str(error):
            raise
        raise ValueError(f"a setting of this recipe needs a library that is not installed: {error}") from error
    return output


def _is_lost_connection(error: Exception) -> bool:
    """Whether an error says that the other processes of a distributed run cannot be reached."""
    if isinstance(error, getattr(torch.distributed, "DistError", ())):
        return True
    text = str(error).lower()
    lost = (
        "connection closed by peer",
        "connection reset by peer",
        "broken pipe",
        "timed out waiting",
        "connection refused",
    )
    return int(os.environ.get("WORLD_SIZE", 1)) > 1 and any(part in text for part in lost)


def _make_trainer(recipe: Recipe, arguments: TrainingArguments) -> CalmTrainer:
    output = Path(recipe.output_dir)
    set_seed(recipe.seed)
    model = build_model(recipe)
    if recipe.brier_blocks is not None:
        check_scorable(model.config)
    train_blocks, validation_blocks = load_blocks(recipe, model)
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(output / "tensorboard")  # the one way the Trainer offers
    trainer = CalmTrainer(
        model=model,
        args=arguments,
        train_dataset=train_blocks,
        eval_dataset=validation_blocks,
        callbacks=[_ClaimCallback(recipe), JsonlCallback(output / "metrics.jsonl")],
        brier_blocks=recipe.brier_blocks,
        about={"data": data_fingerprint(recipe)},
        keep=recipe.training["save_total_limit"],
    )
    trainer.remove_callback(TqdmCallback)
    trainer.remove_callback(PrinterCallback)
    return trainer


@contextmanager
def _alone_in(output: Path, arguments: TrainingArguments, check: Callable[[], None]) -> Iterator[None]:
    """Make the directory and keep other runs out of it; ValueError, for all processes, where one is at work there.

    Args:
        check: ValueError where the directory holds something else, which another run may have put there meanwhile.
    """
    error: list[str | None] = [None]
    with ExitStack() as held:
        if arguments.process_index == 0:
            problem = f"another process is training in {output}: wait for it, or take another output_dir."
            try:
                held.enter_context(hold_lock(output / LOCK, problem, keep=True))
                check()
            except (ValueError, OSError) as other:
                error = [str(other)]
        (message,) = broadcast_object_list(error)
        if message is not None:
            raise ValueError(message)
        yield


def _check_start(recipe: Recipe, allow_recipe_change: bool, verify: bool) -> None:
    check_output(recipe, allow_recipe_change)
    for path in filter(None, (recipe.data.train, recipe.data.validation)):
        check_checksums(Path(path), read_manifest(path), every_chunk=verify)


def _run(
    trainer: CalmTrainer, recipe: Recipe, progress: Progress | None, progress_callback: ProgressCallback | None
) -> None:
    is_main, numbered = trainer.is_world_process_zero(), cast(NumberedBlocks, trainer.train_dataset)
    blocks = numbered.blocks
    interruption = InterruptionCallback()
    trainer.add_callback(interruption)
    with nullcontext(progress) if progress else make_progress(disable=not is_main) as shown:
        if is_main and isinstance(blocks, ConversationBlocks) and blocks.num_cut:
            shown.console.out(
                f"{blocks.num_cut:,} of {len(blocks.lengths):,} examples are longer than a block of "
                f"{recipe.data.block_size} tokens: the front of their prompts is left out",
                highlight=False,
            )
        if trainer.args.world_size == 1 and trainer.args.device.type == "cuda" and torch.cuda.device_count() > 1:
            shown.console.out(
                f"training on one of {torch.cuda.device_count()} GPUs; on all of them: torchrun --nproc-per-node "
                f"{torch.cuda.device_count()} --no-python calm train ...",
                highlight=False,
            )
        if is_main and (steps := _planned_steps(trainer)) <= trainer.args.warmup_steps:
            shown.console.out(
                f"the warm-up of {trainer.args.warmup_steps:g} steps does not end within the {steps} of this run: the "
                "learning rate stays below training.learning_rate. Set training.warmup_steps lower.",
                highlight=False,
            )
        checkpoint = checkpoint_to_resume(trainer, recipe, partial(shown.console.out, highlight=False))
        if is_main:
            trainer.add_callback(progress_callback or ProgressCallback(shown, f"train {recipe.stage}"))
        try:
            _train_to_the_end(trainer, recipe, checkpoint)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            raise ValueError(_more_memory(trainer, recipe, error)) from error
        finally:
            interruption.restore()
    if interruption.signal is not None and trainer.state.global_step < trainer.state.max_steps:
        raise TrainingInterruptedError(interruption.signal, trainer.state.global_step)
    save_result(trainer, recipe)


def _planned_steps(trainer: CalmTrainer) -> int:
    """Steps of the whole run."""
    if trainer.args.max_steps > 0:
        return trainer.args.max_steps
    return math.ceil(trainer.args.num_train_epochs * trainer._get_train_sampler().steps_per_pass)


def _claim(recipe: Recipe) -> None:
    """Make the directory this recipe's, and its run one that is under way."""
    output = Path(recipe.output_dir)
    (output / COMPLETE).unlink(missing_ok=True)
    write_whole(output / RECIPE, recipe.to_yaml())


class _ClaimCallback(TrainerCallback):
    """Claims the directory when training goes on: behind the checkpoint, which may not fit. Until then what is there
    stays as it is."""

    def __init__(self, recipe: Recipe):
        self.recipe = recipe

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            _claim(self.recipe)


def _train_to_the_end(trainer: CalmTrainer, recipe: Recipe, checkpoint: Path | None) -> None:
    if checkpoint is None:
        trainer.train()
        return
    state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
    if state.global_step >= _planned_steps(trainer):
        # The kill fell behind the last step; the Trainer, asked to go on, would take one step too many.
        best = state.best_model_checkpoint if trainer.args.load_best_model_at_end else None
        # Among the checkpoints of the run where it lies now.
        trainer._load_from_checkpoint(str(checkpoint.with_name(Path(best).name) if best else checkpoint))
        trainer.state = state
        if trainer.is_world_process_zero():
            _claim(recipe)
        return
    trainer.averages.load(checkpoint / f"averages_{trainer.args.process_index}.json")
    trainer.train(resume_from_checkpoint=str(checkpoint))


def save_result(trainer: CalmTrainer, recipe: Recipe) -> None:
    """Put model and tokenizer into the output directory, each file whole, and mark the run as complete."""
    output = Path(recipe.output_dir)
    state = trainer.accelerator.get_state_dict(trainer.model)
    if trainer.is_world_process_zero():
        draft = output / ".model.partial"
        shutil.rmtree(draft, ignore_errors=True)
        try:
            model = trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False)
            # Gathered from shards, a weight that is another one comes as a copy of it.
            state = {name: value for name, value in state.items() if name not in model.all_tied_weights_keys}
            model.save_pretrained(draft, state_dict=state)
            load_tokenizer(recipe.data.train).save_pretrained(draft)
            for path in draft.iterdir():
                path.replace(output / path.name)
        finally:
            shutil.rmtree(draft, ignore_errors=True)
        write_whole(output / COMPLETE, lambda path: trainer.state.save_to_json(str(path)))
    trainer.accelerator.wait_for_everyone()


def _more_memory(trainer: CalmTrainer, recipe: Recipe, error: Exception) -> str:
    arguments = trainer.args
    return (
        f"out of memory in step {trainer.state.global_step + 1} with {arguments.per_device_train_batch_size} blocks of "
        f"{recipe.data.block_size} tokens at once. The same training in less memory: halve "
        "training.per_device_train_batch_size and double training.gradient_accumulation_steps, or set "
        f"training.gradient_checkpointing=true. ({str(error).splitlines()[0]})"
    )


def load_blocks(recipe: Recipe, model: PreTrainedModel) -> tuple[Blocks, Blocks | None]:
    """Training and validation blocks; ValueError when they do not fit the model or each other."""
    blocks = _blocks(recipe, recipe.data.train, model)
    if blocks.manifest["vocab_size"] > model.config.vocab_size:
        raise ValueError(
            f"{recipe.data.train} was prepared with {blocks.manifest['vocab_size']} tokens, the model knows "
            f"{model.config.vocab_size}: prepare it with the model's tokenizer."
        )
    if recipe.data.validation is None:
        return blocks, None
    validation = _blocks(recipe, recipe.data.validation, model)
    if validation.manifest["tokenizer_sha256"] != blocks.manifest["tokenizer_sha256"]:
        raise ValueError(
            f"{recipe.data.train} and {recipe.data.validation} were prepared with different tokenizers: run "
            "`calm prepare` for both with one."
        )
    return blocks, validation


def _blocks(recipe: Recipe, path: str, model: PreTrainedModel) -> Blocks:
    patch_size = patch_size_of(model.config)
    if read_manifest(path).get("kind") != "conversations":
        return TokenBlocks(path, recipe.data.block_size, patch_size)
    if recipe.stage == "autoencoder":
        raise ValueError(f"an autoencoder is trained on documents, and {path} holds prompts and responses.")
    if recipe.brier_blocks is not None and path == recipe.data.validation:
        raise ValueError(f"brier_blocks needs documents in data.validation, and {path} holds prompts and responses.")
    separator = getattr(model.config, "separator_id", None)
    return ConversationBlocks(path, recipe.data.block_size, patch_size, separator)
