"""A thin subclass of transformers' Trainer: averages what the models report, and writes it where people look."""

import json
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from calm.evaluation.brier_lm import evaluate_brier
from calm.evaluation.brier_scores import NGRAM
from calm.evaluation.reconstruction import LIVE_VARIANCE
from calm.files import write_whole
from calm.models.modeling_autoencoder import CalmAutoencoder
from calm.models.modeling_calm import CalmForCausalLM


class CalmTrainer(Trainer):
    """Trainer that logs, beside the loss, the parts of it that the model reports, and tokens per second."""

    def __init__(self, *args, brier_blocks: int | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        self.brier_blocks = brier_blocks
        self._sums: dict[str, Any] = defaultdict(float)
        self._count = 0
        self._tokens = 0
        self._since = time.perf_counter()

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch)
        if model.training:
            for name, value in report(self.accelerator.unwrap_model(model), outputs).items():
                self._sums[name] += value.detach()
            self._count += 1
            self._tokens += inputs["input_ids"].numel()
        return (loss, outputs) if return_outputs else loss

    def evaluate(self, *args, **kwargs) -> dict[str, float]:
        """Held-out loss and, where the recipe asks for it, BrierLM on some of the held-out blocks."""
        metrics = super().evaluate(*args, **kwargs)
        if self.brier_blocks is not None:
            model: Any = self.accelerator.unwrap_model(self.model)
            blocks: Any = self.eval_dataset
            stride = model.config.patch_size if isinstance(model, CalmForCausalLM) else NGRAM
            result = evaluate_brier(model, blocks, stride, self.brier_blocks)
            scores = {"eval_brier_lm": result.brier_lm, "eval_brier_lm_error": result.brier_lm_error}
            scores |= {f"eval_brier_{n}": value for n, value in enumerate(result.brier, start=1)}
            self.log(scores)
            metrics |= scores
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the averages since the last log to a training record."""
        if "loss" in logs and self._count:
            logs |= {name: float(total) / self._count for name, total in self._sums.items()}
            logs["tokens_per_second"] = self._tokens / (time.perf_counter() - self._since)
            self._sums.clear()
            self._count, self._tokens, self._since = 0, 0, time.perf_counter()
        super().log(logs, start_time)


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


class JsonlCallback(TrainerCallback):
    """Every record as a line of ``metrics.jsonl``; a resumed run drops the records behind its checkpoint first."""

    def __init__(self, path: Path):
        self.path = path

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        if state.is_world_process_zero and self.path.exists():
            lines = self.path.read_text(encoding="utf-8").splitlines()
            kept = [line for line in lines if _step_of(line) <= state.global_step]
            write_whole(self.path, "".join(line + "\n" for line in kept))

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        if state.is_world_process_zero and logs:
            with open(self.path, "a", encoding="utf-8") as file:
                print(json.dumps({"step": state.global_step} | logs), file=file)


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (json.JSONDecodeError, KeyError):
        return float("inf")  # cut short by a kill


def read_metrics(run: Path) -> list[dict]:
    """The records of a run's ``metrics.jsonl``, oldest first."""
    path = Path(run) / "metrics.jsonl"
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if _step_of(line) < float("inf")]
