"""The categorical flow as a drafter: all tokens of a draft in a few passes.

The first pass predicts every token by itself and chooses the first; every later pass sees the chosen tokens and chooses
about as many as all passes before it (see :mod:`calm.models.heads.categorical_flow`).
"""

import itertools
from typing import Any

import torch
from torch import Tensor, nn

from calm.functional.rng import Generator
from calm.models.drafters.base import Draft, DraftBatch, Drafter, join, soft_cross_entropy
from calm.models.drafters.configuration import DrafterConfig
from calm.models.heads.categorical_flow import CategoricalFlowHeadConfig, MaskedTokenNetwork


class CategoricalFlowDrafter(Drafter):
    """Few-pass choice of all tokens of a draft."""

    def __init__(self, config: DrafterConfig):
        super().__init__(config)
        size, num_tokens = config.hidden_size, config.num_tokens
        head = CategoricalFlowHeadConfig(num_mlp_layers=config.num_mlp_layers, layer_norm_eps=config.layer_norm_eps)
        self.schedule = head.schedule(num_tokens)
        self.base_proj = nn.Linear(size, num_tokens * size, bias=False)
        self.output_norm = nn.RMSNorm(size, eps=config.layer_norm_eps)
        self.network = MaskedTokenNetwork(head, num_tokens, size)
        self.post_init()
        self.network.init_weights()

    def _states(self, base: Tensor, hidden: Tensor, token_ids: Tensor, is_chosen: Tensor) -> Tensor:
        return base + self.network(self.embed(token_ids), is_chosen, hidden)

    def propose(
        self,
        features: Tensor,
        token_ids: Tensor,
        temperature: float,
        num_tokens: int,
        generator: Generator = None,
        state: Any = None,
    ) -> Draft:
        size = self.config.num_tokens
        hidden = self.trunk(features, token_ids)
        base = self.base_proj(hidden).unflatten(-1, (size, -1))  # [B, G, D]
        tokens = token_ids.new_zeros(len(hidden), size)
        parts: list[Draft] = []
        for start, stop in itertools.pairwise((*self.schedule, size)):
            stop = min(stop, num_tokens)
            if start >= stop:
                break
            states = base
            if start:
                states = self._states(base, hidden, tokens, torch.arange(size, device=base.device) < start)
            logits = self.logits(self.output_norm(states[:, start:stop]))
            parts.append(self.choose(logits, temperature, generator))
            tokens[:, start:stop] = parts[-1].tokens
        return join(parts)

    def loss(self, batch: DraftBatch, teacher_logits: Tensor, noise: Tensor) -> Tensor:
        size = self.config.num_tokens
        hidden = self.trunk(batch.features, batch.next_ids)
        base = self.base_proj(hidden).unflatten(-1, (size, -1))
        first = soft_cross_entropy(self.logits(self.output_norm(base)), teacher_logits)
        counts = torch.tensor(self.schedule[1:], device=base.device)[(noise * (len(self.schedule) - 1)).long()]
        is_chosen = torch.arange(size, device=base.device) < counts[..., None]
        states = self._states(base, hidden, batch.future_ids, is_chosen)
        later = soft_cross_entropy(self.logits(self.output_norm(states)), teacher_logits)
        return first + later.masked_fill(is_chosen, 0.0)
