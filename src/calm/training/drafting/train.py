"""Training of a drafter on cached features of its target.

The loss is the cross-entropy against the probabilities that the target gives the shortlist at every drafted position.
They follow from the cached features of its last layer, which must be the last of the feature layers.

Shapes: B texts, T positions, G drafted tokens, F features, M shortlist.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from calm.models.drafters.base import DraftBatch, Drafter
from calm.training.drafting.features import FeatureCache

_STATE = "trainer_state.pt"


@dataclass(frozen=True)
class DraftTraining:
    """Settings of a training run.

    Args:
        num_epochs: passes over the texts.
        tokens_per_step: positions of one optimiser step, about.
        learning_rate: highest learning rate; it decays to a tenth as a cosine.
        offset_decay: weight of a drafted token relative to the one before it: later tokens are reached less often.
    """

    num_epochs: int = 4
    tokens_per_step: int = 1024
    learning_rate: float = 1e-3
    warmup_steps: int = 30
    weight_decay: float = 0.01
    offset_decay: float = 0.8
    save_steps: int = 50
    seed: int = 0


def frequent_tokens(cache: FeatureCache, size: int, vocab_size: int) -> Tensor:
    """Return the ids of the ``size`` most frequent tokens of the continuations, in ascending order."""
    tokens = torch.from_numpy(cache.token_ids[cache.is_target])
    counts = torch.bincount(tokens, minlength=vocab_size)
    return counts.topk(min(size, vocab_size)).indices.sort().values


def train_drafter(
    drafter: Drafter,
    cache: FeatureCache,
    texts: Sequence[int],
    settings: DraftTraining,
    directory: Path,
    on_step: Callable[[int, int, float], None] | None = None,
) -> Drafter:
    """Train a drafter that is attached to its target, and save it to ``directory``.

    A run that was interrupted resumes from its last saved state, with the same batches.
    """
    steps = _steps(cache, texts, settings)
    optimizer = torch.optim.AdamW(
        drafter.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay, betas=(0.9, 0.95)
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, len(steps), settings.warmup_steps))
    start, state = 0, directory / _STATE
    if state.exists():
        saved = torch.load(state, weights_only=True)
        drafter.load_state_dict(saved["drafter"])
        optimizer.load_state_dict(saved["optimizer"])
        schedule.load_state_dict(saved["schedule"])
        start = saved["step"]
    drafter.train()
    for step in range(start, len(steps)):
        loss = _loss(drafter, cache, steps[step], settings, step)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(drafter.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if on_step is not None:
            on_step(step + 1, len(steps), float(loss.detach()))
        if (step + 1) % settings.save_steps == 0:
            directory.mkdir(parents=True, exist_ok=True)
            saved = {
                "drafter": drafter.state_dict(), "optimizer": optimizer.state_dict(),
                "schedule": schedule.state_dict(), "step": step + 1,
            }  # fmt: skip
            torch.save(saved, state.with_suffix(".tmp"))
            state.with_suffix(".tmp").replace(state)
    drafter.eval().save_pretrained(directory)
    state.unlink(missing_ok=True)
    return drafter


def _steps(cache: FeatureCache, texts: Sequence[int], settings: DraftTraining) -> list[list[int]]:
    """Return the texts of every step: shuffled in every epoch, texts of about the same length together."""
    generator = torch.Generator().manual_seed(settings.seed)
    length = [stop - start for start, stop in zip(cache.starts, cache.starts[1:], strict=False)]
    steps: list[list[int]] = []
    for _ in range(settings.num_epochs):
        order = [texts[index] for index in torch.randperm(len(texts), generator=generator).tolist()]
        batches: list[list[int]] = []
        for chunk in range(0, len(order), 64):  # sorted within pieces, so that little is padded
            batch: list[int] = []
            for text in sorted(order[chunk : chunk + 64], key=length.__getitem__):
                if batch and (len(batch) + 1) * length[text] > settings.tokens_per_step:
                    batches.append(batch)
                    batch = []
                batch.append(text)
            batches.append(batch)
        steps += [batches[index] for index in torch.randperm(len(batches), generator=generator).tolist()]
    return steps


def _rate(step: int, num_steps: int, warmup_steps: int) -> float:
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(num_steps - warmup_steps, 1)
    return 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * progress))


def _loss(drafter: Drafter, cache: FeatureCache, texts: Sequence[int], settings: DraftTraining, step: int) -> Tensor:
    batch, teacher_logits = make_batch(drafter, [cache.text(index) for index in texts])
    generator = torch.Generator().manual_seed(settings.seed + 1_000_003 * (step + 1))
    noise = torch.rand(batch.next_ids.shape, generator=generator)
    losses = drafter.loss(batch, teacher_logits, noise)
    offsets = torch.arange(losses.shape[-1])
    weights = batch.is_target * settings.offset_decay**offsets
    return (losses * weights).sum() / weights.sum().clamp(min=1e-6)


def make_batch(drafter: Drafter, texts: list[tuple[Tensor, Tensor, Tensor]]) -> tuple[DraftBatch, Tensor]:
    """Return texts as drafters train on them, and the target's logits of the shortlist, ``[B, T, G, M]``.

    Position t has the target's features of token t, the next token t + 1, and drafts the tokens t + 2 to t + 1 + G. The
    target's prediction of token t + 1 + j follows from its features of token t + j.
    """
    num_tokens = drafter.config.num_tokens
    features, token_ids, is_target = (
        torch.nn.utils.rnn.pad_sequence(list(parts), batch_first=True) for parts in zip(*texts, strict=True)
    )
    length = max(token_ids.shape[1] - 2, 1)
    ahead = num_tokens + 2
    token_ids = torch.nn.functional.pad(token_ids, (0, ahead))
    is_target = torch.nn.functional.pad(is_target, (0, ahead))
    features = torch.nn.functional.pad(features, (0, 0, 0, ahead))
    places = torch.arange(length)[:, None] + torch.arange(num_tokens) + 1  # [T, G], of the features that predict
    with torch.no_grad():
        logits = drafter.logits(features[..., -drafter.config.hidden_size :])
    batch = DraftBatch(
        features[:, :length],
        token_ids[:, 1 : length + 1],
        token_ids[:, places + 1],
        is_target[:, places + 1],
    )
    return batch, logits[:, places]
