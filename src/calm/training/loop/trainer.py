"""A thin subclass of transformers' Trainer: runs that do not depend on how they are divided, checkpoints that hold.

Data order and noise come from :mod:`calm.training.state.data_order`. Every checkpoint gets a manifest
(:mod:`calm.training.state.checkpoint_manifest`). A training record holds the mean of everything the model reports, over
all micro-batches and processes since the last record.
"""

import json
import shutil
import time
from contextlib import nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import FullyShardedDataParallelPlugin, broadcast_object_list
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import Dataset
from transformers import Trainer
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME
from transformers.utils import SAFE_WEIGHTS_NAME

from calm.compat import fsdp
from calm.compat.masking import no_packed_sequences
from calm.data.blocks import TokenBlocks
from calm.evaluation.brier_lm import evaluate_brier
from calm.evaluation.reconstruction import LIVE_VARIANCE
from calm.functional.brier import NGRAM
from calm.models.context import patch_size_of
from calm.models.modeling_autoencoder import CalmAutoencoder
from calm.models.modeling_calm import CalmForCausalLM, target_patches
from calm.training.recipe.trainer_arguments import asks_for_fsdp
from calm.training.state.checkpoint_manifest import rotate, seal
from calm.training.state.data_order import NumberedBlocks, ShuffledSteps, collate_numbered, noise_of_blocks

_FROM_RECIPE = ("initial_lr", "weight_decay", "betas", "eps")
_EVALUATION = -1  # the step that noise in evaluations belongs to: the same in all of them


class CalmTrainer(Trainer):
    """Trainer of autoencoders, CALMs and token models on blocks of tokens.

    Args:
        about: what a checkpoint says about its run, beside what the Trainer knows.
        keep: checkpoints that stay; None keeps all.
        brier_blocks: score so many held-out blocks with every evaluation.
    """

    def __init__(
        self,
        *,
        train_dataset: Dataset,
        eval_dataset: Dataset | None = None,
        about: dict[str, Any] | None = None,
        keep: int | None = None,
        brier_blocks: int | None = None,
        **kwargs,
    ):
        held_out = None if eval_dataset is None else NumberedBlocks(eval_dataset)
        super().__init__(
            **kwargs,
            train_dataset=NumberedBlocks(train_dataset),
            eval_dataset=held_out,
            data_collator=collate_numbered,
        )
        if self.plugin is not None:
            model: Any = self.model
            fsdp.configure(self.accelerator, self.plugin, model)
            self.is_fsdp_enabled = True
        # compute_loss gives the mean of a micro-batch, whatever the model could do with a count of its tokens.
        self.model_accepts_loss_kwargs = False
        self.held_out_blocks = eval_dataset
        self.about = about or {}
        self.keep = keep
        self.brier_blocks = brier_blocks
        self.averages = Averages()
        self._first_bad_step = torch.tensor(-1, device=self.args.device)

    def _get_train_sampler(self, train_dataset: Any = None) -> ShuffledSteps:
        return ShuffledSteps(
            len(self.train_dataset),  # type: ignore[arg-type]
            blocks_per_step(self.args),
            self.args.seed,
            step=lambda: self.state.global_step,
        )

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        inputs = dict(inputs)
        numbers = inputs.pop("number")
        weight = inputs.pop("weight", None)
        plain = self.accelerator.unwrap_model(model, keep_torch_compile=False)
        if isinstance(plain, CalmAutoencoder | CalmForCausalLM):
            step = self.state.global_step if model.training else _EVALUATION
            inputs["generator"] = noise_of_blocks(numbers, self.args.seed, step, inputs["input_ids"].device)
        with no_packed_sequences():
            outputs = model(**inputs)
        if model.training:
            parts = report(plain, outputs)
            if weight is not None:
                outputs.loss = outputs.loss * weight
                parts = {name: value * weight for name, value in parts.items()}
            loss = outputs.loss.detach()
            good = loss.isfinite() | (self._first_bad_step >= 0)
            self._first_bad_step = torch.where(good, self._first_bad_step, self.state.global_step + 1)
            self.averages.add({"loss": loss} | parts, inputs["input_ids"].numel())
        return (outputs.loss, outputs) if return_outputs else outputs.loss

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """Where blocks differ in their number of targets, micro-batches weigh as much as they have of them."""
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        dataset: Any = self.train_dataset
        model: Any = self.model
        if batches and not isinstance(dataset.blocks, TokenBlocks):
            patch_size = patch_size_of(model.config)
            counts = torch.stack([target_patches(batch["labels"], patch_size).sum() for batch in batches])
            mean = self.accelerator.gather(counts).float().mean()
            for batch, count in zip(batches, counts, strict=True):
                batch["weight"] = count / mean
        return batches, num_items

    def evaluate(self, *args, **kwargs) -> dict[str, float]:
        """Held-out loss and, where the recipe asks for it, BrierLM on some of the held-out blocks."""
        start = time.perf_counter()
        metrics = super().evaluate(*args, **kwargs)
        if self.brier_blocks is not None:
            # One process scores, and all go on with the same record.
            (scores,) = broadcast_object_list([self._brier_scores() if self.is_world_process_zero() else None])
            self.log(scores)
            metrics |= scores
        self.averages.since += time.perf_counter() - start  # the rate is that of training
        return metrics

    def _brier_scores(self) -> dict[str, float]:
        model: Any = self.accelerator.unwrap_model(self.model)
        blocks: Any = self.held_out_blocks
        stride = model.config.patch_size if isinstance(model, CalmForCausalLM) else NGRAM
        result = evaluate_brier(model, blocks, stride, num_blocks=self.brier_blocks)
        scores = {"eval_brier_lm": result.brier_lm}
        if result.brier_lm_error is not None:
            scores["eval_brier_lm_error"] = result.brier_lm_error
        return scores | {f"eval_brier_{n}": value for n, value in enumerate(result.brier, start=1)}

    @cached_property
    def plugin(self) -> FullyShardedDataParallelPlugin | None:
        """How the model is sharded; None where it is not."""
        if not asks_for_fsdp(self.args):
            return None
        # The one accelerate shards with; on processors it keeps none.
        kept = getattr(self.accelerator.state, "fsdp_plugin", None)
        return kept or FullyShardedDataParallelPlugin(**(self.args.fsdp_plugin_args or {}))

    def _prepare_for_training(self, *args, **kwargs):
        with nullcontext() if self.plugin is None else fsdp.embeddings_in_the_root(self.model):
            prepared = super()._prepare_for_training(*args, **kwargs)
        fsdp.check_autoencoder_is_whole(self.model)  # type: ignore[arg-type]
        return prepared

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.plugin is None:
            return super()._save_optimizer_and_scheduler(output_dir)
        optimizer: Any = self.optimizer
        scheduler: Any = self.lr_scheduler
        state = fsdp.whole_optimizer_state(optimizer.optimizer, keep=self.args.should_save)
        if state is not None:
            torch.save(state, Path(output_dir) / OPTIMIZER_NAME)
            torch.save(scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)
        return None

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None) -> None:
        if self.plugin is None:
            return super()._load_from_checkpoint(resume_from_checkpoint, model)
        plain: Any = self.model
        return fsdp.load_weights(plain, Path(resume_from_checkpoint) / SAFE_WEIGHTS_NAME)

    def _load_best_model(self) -> None:
        if self.plugin is None:
            return super()._load_best_model()
        return self._load_from_checkpoint(self.state.best_model_checkpoint)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Moments and position come from the checkpoint, rates and decay from the recipe, which may have changed."""
        if checkpoint is None or self.optimizer is None:
            return super()._load_optimizer_and_scheduler(checkpoint)
        optimizer: Any = self.optimizer
        scheduler: Any = self.lr_scheduler
        groups = [{name: group[name] for name in _FROM_RECIPE if name in group} for group in optimizer.param_groups]
        if self.plugin is None:
            super()._load_optimizer_and_scheduler(checkpoint)
        else:
            fsdp.load_optimizer_state(optimizer.optimizer, Path(checkpoint) / OPTIMIZER_NAME)
            scheduler.load_state_dict(torch.load(Path(checkpoint) / SCHEDULER_NAME, weights_only=True))
        for group, values in zip(optimizer.param_groups, groups, strict=True):
            group.update(values)
        if isinstance(scheduler, LambdaLR):
            scheduler.base_lrs = [group["initial_lr"] for group in groups]
            for group, factor in zip(optimizer.param_groups, scheduler.lr_lambdas, strict=True):
                group["lr"] = group["initial_lr"] * factor(scheduler.last_epoch)
            scheduler._last_lr = [group["lr"] for group in optimizer.param_groups]  # what a record says
        return None

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the averages since the last log to a training record."""
        if "train_runtime" in logs:
            return  # the Trainer's summary of what it did since it was started last, not of the run
        if "loss" in logs:
            self.check_finite()
            logs |= self.averages.means(self.accelerator)
            self.averages = Averages()
        super().log(logs, start_time)

    def check_finite(self) -> None:
        """Raises ValueError that names the first step whose loss was no number, in any process."""
        steps = self.accelerator.gather(self._first_bad_step[None])
        bad = steps[steps >= 0]
        if len(bad):
            raise ValueError(
                f"the loss of step {int(bad.min())} is not finite (nan or inf); the checkpoints before it are kept. "
                "Lower training.learning_rate or training.max_grad_norm, or look at the data, and start again with "
                "--allow-recipe-change."
            )

    def _save_checkpoint(self, model, trial) -> None:
        self.check_finite()
        folder = Path(str(self.args.output_dir))
        checkpoint = folder / f"checkpoint-{self.state.global_step}"
        try:
            super()._save_checkpoint(model, trial)
            self.averages.save(checkpoint / f"averages_{self.args.process_index}.json")
            self.accelerator.wait_for_everyone()
            if self.is_world_process_zero():
                about = {"num_processes": self.args.world_size, "blocks_per_step": blocks_per_step(self.args)}
                seal(checkpoint, about | self.about)
        except Exception as error:
            shutil.rmtree(checkpoint, ignore_errors=True)
            free = shutil.disk_usage(folder).free / 2**30
            raise OSError(
                f"the checkpoint of step {self.state.global_step} cannot be written to {folder} ({free:.1f} GiB free): "
                f"{error!r}. Earlier checkpoints are whole; make room and run the command again."
            ) from error
        if self.is_world_process_zero():
            best = self.state.best_model_checkpoint if self.args.load_best_model_at_end else None
            rotate(folder, self.keep, best)


class Averages:
    """Means of what the model reports, over micro-batches and processes."""

    def __init__(self) -> None:
        self.sums: dict[str, Any] = {}
        self.count = 0
        self.tokens = 0
        self.since = time.perf_counter()

    def add(self, values: dict[str, torch.Tensor], num_tokens: int) -> None:
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0) + value.detach().float()
        self.count += 1
        self.tokens += num_tokens

    def means(self, accelerator) -> dict[str, float]:
        """The means and the tokens per second of all processes."""
        if not self.count:
            return {}
        sums = torch.stack([torch.as_tensor(value, device=accelerator.device) for value in self.sums.values()])
        means = accelerator.reduce(sums, "mean") / self.count
        rate = self.tokens * accelerator.num_processes / (time.perf_counter() - self.since)
        return dict(zip(self.sums, means.tolist(), strict=True)) | {"tokens_per_second": rate}

    def save(self, path: Path) -> None:
        """For a run that goes on between two records."""
        sums = {name: float(value) for name, value in self.sums.items()}
        path.write_text(json.dumps({"sums": sums, "count": self.count}), encoding="utf-8")

    def load(self, path: Path) -> None:
        if path.exists():
            state = json.loads(path.read_text(encoding="utf-8"))
            self.sums, self.count = state["sums"], state["count"]


def blocks_per_step(args) -> int:
    """Blocks of one optimiser step, of all processes and micro-batches together."""
    return args.train_batch_size * args.gradient_accumulation_steps * args.world_size


@torch.no_grad()
def report(model: torch.nn.Module, outputs) -> dict[str, torch.Tensor]:
    """What a training record says beside the loss; scalars."""
    if isinstance(model, CalmAutoencoder):
        return {
            "reconstruction_loss": outputs.reconstruction_loss,
            "accuracy": outputs.accuracy,
            "kl": outputs.kl,
            "live_dimensions": outputs.mean.flatten(0, -2).float().var(0).gt(LIVE_VARIANCE).sum(),
        }
    if isinstance(model, CalmForCausalLM):
        return dict(outputs.metrics)
    return {}
