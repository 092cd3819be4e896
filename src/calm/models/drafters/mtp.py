"""Multi-token prediction as a drafter: tokens one after the other through a small recurrence."""

from typing import Any

import torch
from torch import Tensor, nn

from calm.functional.rng import Generator
from calm.models.drafters.base import Draft, DraftBatch, Drafter, join, soft_cross_entropy
from calm.models.drafters.configuration import DrafterConfig


class MTPDrafter(Drafter):
    """The state of a token follows from the state before it and the token that was chosen from that.

    The recurrence has the same weights at every step, so a draft may be longer than those of training.
    """

    def __init__(self, config: DrafterConfig):
        super().__init__(config)
        size, eps = config.hidden_size, config.layer_norm_eps
        self.norm = nn.RMSNorm(size, eps=eps)
        self.step = nn.Sequential(nn.Linear(2 * size, 2 * size), nn.SiLU(), nn.Linear(2 * size, size))
        self.output_norm = nn.RMSNorm(size, eps=eps)
        self.post_init()

    def _next(self, states: Tensor, token_ids: Tensor) -> Tensor:
        return states + self.step(torch.cat([self.norm(states), self.embed(token_ids)], dim=-1))

    def propose(
        self,
        features: Tensor,
        token_ids: Tensor,
        temperature: float,
        num_tokens: int,
        generator: Generator = None,
        state: Any = None,
    ) -> Draft:
        states = self.trunk(features, token_ids)
        parts: list[Draft] = []
        for _ in range(num_tokens):
            states = self._next(states, parts[-1].tokens[:, 0]) if parts else states
            parts.append(self.choose(self.logits(self.output_norm(states))[:, None], temperature, generator))
        return join(parts)

    def loss(self, batch: DraftBatch, teacher_logits: Tensor, noise: Tensor) -> Tensor:
        states = self.trunk(batch.features, batch.next_ids)
        losses = []
        for index in range(batch.future_ids.shape[-1]):
            states = states if index == 0 else self._next(states, batch.future_ids[..., index - 1])
            logits = self.logits(self.output_norm(states))
            losses.append(soft_cross_entropy(logits, teacher_logits[..., index, :]))
        return torch.stack(losses, -1)
