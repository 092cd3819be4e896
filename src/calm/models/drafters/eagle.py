"""An EAGLE-style drafter: one decoder layer over the target's features and the tokens after them.

It reads the whole text and has a key/value cache of its own. After the first drafted token its own output takes the
place of the target's features. Training unrolls these steps (Li et al. 2025, EAGLE-3, arXiv 2503.01840): in step j the
keys of earlier positions are those of the target's features, and the last j - 1 are the drafter's own.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache, LlamaConfig, LlamaModel

from calm.functional.rng import Generator
from calm.models.drafters.base import Draft, DraftBatch, Drafter, join, soft_cross_entropy
from calm.models.drafters.configuration import DrafterConfig


@dataclass
class EagleState:
    """Key/value cache of the texts so far, which of its positions count, and the output of the last position.

    Args:
        mask: ``[B, P]``, 1 for positions that count.
        output: ``[B, D]``; None for empty texts.
    """

    cache: DynamicCache
    mask: Tensor
    output: Tensor | None = None


class EagleDrafter(Drafter):
    """Autoregressive drafts from one decoder layer."""

    def __init__(self, config: DrafterConfig):
        super().__init__(config)
        size = config.hidden_size
        self.blocks = nn.ModuleList()  # the decoder layer takes the place of the trunk's blocks
        self.output_proj = nn.Linear(size, size, bias=False)
        self.decoder = LlamaModel(
            LlamaConfig(
                vocab_size=1,
                hidden_size=size,
                intermediate_size=4 * size,
                num_hidden_layers=1,
                num_attention_heads=config.num_attention_heads,
                num_key_value_heads=config.num_attention_heads,
                max_position_embeddings=2**16,
                pad_token_id=None,
                bos_token_id=None,
                eos_token_id=None,
            )
        )
        self.post_init()

    def _inputs(self, outputs: Tensor, token_ids: Tensor) -> Tensor:
        """Return inputs of a step that follows the drafter's own outputs, ``[..., D]``."""
        return self.output_proj(F.rms_norm(outputs, outputs.shape[-1:])) + self.token_proj(self.embed(token_ids))

    def new_state(self, num_rows: int) -> EagleState:
        return EagleState(DynamicCache(), torch.zeros(num_rows, 0, dtype=torch.long, device=self.device))

    def extend(self, state: EagleState, features: Tensor, token_ids: Tensor, lengths: Tensor) -> None:
        counts = torch.arange(token_ids.shape[1], device=token_ids.device) < lengths[:, None]
        outputs = self._read(state, self.trunk(features, token_ids), counts.long())
        rows = torch.arange(len(lengths), device=lengths.device)
        state.output = outputs[rows, (lengths - 1).clamp(min=0)]

    def _read(self, state: EagleState, inputs: Tensor, counts: Tensor) -> Tensor:
        position = state.mask.sum(1, keepdim=True) + counts.cumsum(1) - 1
        state.mask = torch.cat([state.mask, counts], dim=1)
        return self.decoder(
            inputs_embeds=inputs,
            attention_mask=None if bool(state.mask.all()) else state.mask,
            position_ids=position.clamp(min=0),
            past_key_values=state.cache,
            use_cache=True,
        ).last_hidden_state

    def propose(
        self,
        features: Tensor,
        token_ids: Tensor,
        temperature: float,
        num_tokens: int,
        generator: Generator = None,
        state: Any = None,
    ) -> Draft:
        assert isinstance(state, EagleState)
        assert state.output is not None
        mask, outputs = state.mask, state.output
        parts: list[Draft] = []
        for _ in range(num_tokens):
            if parts:
                inputs = self._inputs(outputs[:, None], parts[-1].tokens)
                outputs = self._read(state, inputs, torch.ones_like(parts[-1].tokens))[:, 0]
            parts.append(self.choose(self.logits(outputs)[:, None], temperature, generator))
        if num_tokens > 1:
            state.cache.crop(1 - num_tokens)  # what was drafted is not verified
        state.mask = mask
        return join(parts)

    def loss(self, batch: DraftBatch, teacher_logits: Tensor, noise: Tensor) -> Tensor:
        num_rows, length, num_tokens = batch.future_ids.shape
        positions = torch.arange(length, device=noise.device)
        cache = DynamicCache()
        inputs = outputs = self.trunk(batch.features, batch.next_ids)
        losses = []
        for step in range(num_tokens):
            if step:
                # A draft that starts at t is at position t + step now.
                inputs = self._inputs(F.pad(outputs, (0, 0, 1, 0))[:, :-1], batch.next_ids)
            outputs = self.decoder(
                inputs_embeds=inputs,
                attention_mask=_unrolled_mask(length, step, inputs).expand(num_rows, 1, -1, -1),
                position_ids=positions[None],
                past_key_values=cache,
                use_cache=True,
            ).last_hidden_state
            drafted = outputs[:, step:]
            losses.append(
                F.pad(soft_cross_entropy(self.logits(drafted), teacher_logits[:, : length - step, step]), (0, step))
            )
        return torch.stack(losses, -1)


def _unrolled_mask(length: int, step: int, like: Tensor) -> Tensor:
    """Return the additive attention mask of an unrolled step, ``[T, (step + 1) * T]``.

    Position t sees the keys of the target's features up to t - step, and of every later step i its own key at
    t - step + i.
    """
    query = torch.arange(length, device=like.device)[:, None]
    key = torch.arange(length, device=like.device)[None]
    parts = [key <= query - step] + [key == query - step + index for index in range(1, step + 1)]
    allowed = torch.cat(parts, dim=1)
    if step:  # positions without a draft of their own attend to something, so that no row is empty
        allowed[:step, -length:] |= key == query[:step]
    return torch.zeros(allowed.shape, dtype=like.dtype, device=like.device).masked_fill(
        ~allowed, torch.finfo(like.dtype).min
    )
