"""A drafter for a token model: continuations of prompts by the target, its features, training.

Every stage is kept in the output directory, so that an interrupted run resumes where it was.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from calm.generation.drafting import check_target, up_to_end
from calm.generation.model_runner import end_ids
from calm.generation.prompts import left_padded
from calm.models.drafters import DRAFTERS, Drafter, DrafterConfig
from calm.models.drafters.base import target_hash
from calm.training.drafting.features import DraftText, write_features
from calm.training.drafting.train import DraftTraining, frequent_tokens, train_drafter
from calm.utils.files import only_writer, write_whole

OnProgress = Callable[[str, int, int, str], None]  # stage, done, total, note
_PROMPTS_AT_ONCE = 32


@dataclass(frozen=True)
class DrafterPlan:
    """What to train.

    Args:
        drafter_type: see :class:`~calm.models.drafters.DrafterConfig`.
        num_tokens: tokens of a draft.
        shortlist_size: tokens that may be drafted, at most.
        continuation_tokens: tokens that the target adds to every prompt at most; 0 trains on the texts as they are.
        training: settings of the training run.
    """

    drafter_type: str = "mtp"
    num_tokens: int = 4
    shortlist_size: int = 4096
    continuation_tokens: int = 160
    training: DraftTraining = field(default_factory=DraftTraining)


def make_drafter(
    target: Any, prompts: list[list[int]], plan: DrafterPlan, directory: Path, on_progress: OnProgress
) -> Drafter:
    """Train a drafter for ``target`` on its continuations of ``prompts`` (token ids), and save it to ``directory``.

    Raises:
        ValueError: for a target that cannot be verified, or for no prompts.
    """
    check_target(target)
    prompts = [prompt for prompt in prompts if prompt]
    if not prompts:
        raise ValueError("there is no prompt to train on: give a file with one prompt per line, or JSONL with `text`.")
    with only_writer(directory):
        texts = list(_continuations(target, prompts, plan, directory / "continuations.jsonl", on_progress))
        layers = _feature_layers(target)
        cache = write_features(
            target, texts, layers, directory / "features", lambda done, total: on_progress("features", done, total, "")
        )
        config = target.config.get_text_config()
        shortlist = frequent_tokens(cache, plan.shortlist_size, config.vocab_size)
        drafter = DRAFTERS[plan.drafter_type](
            DrafterConfig(
                drafter_type=plan.drafter_type,
                num_tokens=plan.num_tokens,
                hidden_size=config.hidden_size,
                num_attention_heads=config.num_attention_heads,
                feature_layers=layers,
                shortlist_size=len(shortlist),
                target_hash=target_hash(target.config),
            )
        )
        drafter.shortlist.copy_(shortlist)
        drafter.attach(target)
        return train_drafter(
            drafter,
            cache,
            range(len(cache)),
            plan.training,
            directory,
            lambda step, total, loss: on_progress("train drafter", step, total, f"loss {loss:.3f}"),
        )


def _feature_layers(target: Any) -> tuple[int, ...]:
    """Return a low, a middle and the last layer; the last only, if there are few."""
    num_layers = target.config.get_text_config().num_hidden_layers
    return (num_layers // 3, 2 * num_layers // 3, -1) if num_layers >= 6 else (-1,)


@torch.no_grad()
def _continuations(
    target: Any, prompts: list[list[int]], plan: DrafterPlan, path: Path, on_progress: OnProgress
) -> Iterator[DraftText]:
    """Yield prompts with the target's continuations; those that the file holds already are read from it."""
    if plan.continuation_tokens == 0:
        yield from (DraftText(tuple(prompt), 1) for prompt in prompts)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    known = []
    if path.exists():
        # An interrupted write leaves a line without its end.
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        known = [json.loads(line) for line in lines if line.endswith("\n")]
        write_whole(path, "".join(json.dumps(record) + "\n" for record in known))
    for record in known:
        yield DraftText(tuple(record["prompt"] + record["continuation"]), len(record["prompt"]))
    ends = end_ids(target)
    with path.open("a", encoding="utf-8") as file:
        for start in range(len(known), len(prompts), _PROMPTS_AT_ONCE):
            batch = prompts[start : start + _PROMPTS_AT_ONCE]
            # Greedy text and samples in turn: drafts are used for both.
            for prompt, row in zip(batch, _continue(target, batch, plan, start // _PROMPTS_AT_ONCE % 2), strict=True):
                continuation = up_to_end(row, ends)
                file.write(json.dumps({"prompt": prompt, "continuation": continuation}) + "\n")
                yield DraftText(tuple(prompt + continuation), len(prompt))
            file.flush()
            on_progress("continuations", min(start + len(batch), len(prompts)), len(prompts), "")


def _continue(target: Any, batch: list[list[int]], plan: DrafterPlan, is_sampled: int) -> list[list[int]]:
    ids, mask = (part.to(target.device) for part in left_padded(batch, 0))
    sampling = {"do_sample": True, "temperature": 1.0, "top_k": 0} if is_sampled else {"do_sample": False}
    out = target.generate(ids, attention_mask=mask, max_new_tokens=plan.continuation_tokens, **sampling)
    return list(out[:, ids.shape[1] :].tolist())
