"""What the engine asks of a model: read a prompt, draw what comes next, take a step with all running sequences.

Shapes: n sequences, K tokens of a chunk (1 of a token model), D hidden.
"""

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from calm.functional.rng import categorical
from calm.functional.temperature import exact_rounds, sharpened
from calm.generation.loop import NextChunk
from calm.models.capabilities import check_plain_logits
from calm.models.layer_access import device_of
from calm.models.modeling_calm import CalmForCausalLM

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sampling:
    """How chunks are drawn; sequences that agree in it are drawn together."""

    temperature: float = 1.0
    sampler: str = "batch"
    num_candidates: int = 200


class Stepper(ABC):
    """A model as the engine sees it.

    Args:
        reader: the part of the model that reads chunks, with the backbone's cache.
    """

    def __init__(self, model: Any, reader: Any, backbone_config: Any, patch_size: int):
        self.model, self.reader, self.backbone_config, self.patch_size = model, reader, backbone_config, patch_size
        self.vocab_size = model.config.vocab_size
        self.end_ids = _end_ids(model)
        self.dtype, self.device = model.dtype, device_of(model)

    @abstractmethod
    def check(self, sampling: Sampling) -> None:
        """ValueError for settings the model cannot follow."""

    @abstractmethod
    def whole_patches(self, ids: list[int]) -> list[int]:
        """Return a prompt as the model reads it: whole patches, at least one."""

    def prefill(self, prompts: list[list[int]]) -> tuple[Tensor, Cache, list[int]]:
        """Read prompts of :meth:`whole_patches` together.

        Returns:
            the conditions ``[n, D]`` of what follows, the cache, and the positions that each prompt has in it.
        """
        # Attention is causal: what fills up the shorter prompts follows their tokens and changes nothing. No mask then.
        longest = max(map(len, prompts))
        ids = torch.tensor([ids + [0] * (longest - len(ids)) for ids in prompts], device=self.device)
        lengths = [len(ids) // self.patch_size for ids in prompts]
        outputs = self.reader(ids, use_cache=True)
        last = torch.tensor(lengths, device=self.device) - 1
        hidden = outputs.last_hidden_state
        return hidden[torch.arange(len(prompts), device=self.device), last], outputs.past_key_values, lengths

    @abstractmethod
    def draw(self, conditions: Tensor, sampling: Sampling, generators: list[torch.Generator]) -> NextChunk:
        """The next K tokens of every row of ``[n, D]``."""

    def draw_in_rounds(
        self, conditions: Tensor, sampling: Sampling, generators: list[torch.Generator]
    ) -> Iterator[tuple[NextChunk, Tensor]] | None:
        """Return :meth:`draw` in pieces where it may take long: an iterator over the chunks and ``[n]``, which of them
        are final. None where it takes one piece.
        """
        return None

    def step(self, tokens: Tensor, positions: Tensor, mask: Tensor, cache: Cache) -> Tensor:
        """Feed chunks ``[n, K]`` back at positions ``[n]``: the next conditions ``[n, D]``."""
        outputs = self.reader(
            tokens, attention_mask=mask, position_ids=positions[:, None], past_key_values=cache, use_cache=True
        )
        return outputs.last_hidden_state[:, -1]


def stepper_of(model: PreTrainedModel) -> Stepper:
    return CalmStepper(model) if isinstance(model, CalmForCausalLM) else TokenStepper(model)


class CalmStepper(Stepper):
    """Stepper of a CALM: K tokens a step."""

    def __init__(self, model: CalmForCausalLM):
        super().__init__(model, model, model.config.backbone_config, model.config.patch_size)

    def check(self, sampling: Sampling) -> None:
        self.model.check_sampling(sampling.temperature, sampling.sampler, sampling.num_candidates)

    def whole_patches(self, ids: list[int]) -> list[int]:
        aligned, _ = self.model.align_prompt(torch.tensor([ids], dtype=torch.long))
        return list(aligned[0].tolist())

    def draw(self, conditions: Tensor, sampling: Sampling, generators: list[torch.Generator]) -> NextChunk:
        return self.model.next_chunk(
            conditions, sampling.temperature, sampling.sampler, sampling.num_candidates, generators
        )

    def draw_in_rounds(
        self, conditions: Tensor, sampling: Sampling, generators: list[torch.Generator]
    ) -> Iterator[tuple[NextChunk, Tensor]] | None:
        if sampling.sampler != "exact" or sampling.temperature == 1:
            return None
        return self._exact(conditions, sampling, generators)

    def _exact(
        self, conditions: Tensor, sampling: Sampling, generators: list[torch.Generator]
    ) -> Iterator[tuple[NextChunk, Tensor]]:
        """The exact sampler of ``next_chunk``, round by round, and the batch sampler where its budget is spent."""
        draws = self.model.draws(conditions, generators)
        for tokens, accepted in exact_rounds(draws, sampling.temperature):
            chunk = NextChunk(tokens, draws.num_drawn, draws.num_decoded)
            yield chunk, accepted
        rows = (~accepted).nonzero()[:, 0]
        if len(rows) == 0:
            return
        log.warning(
            "the samples of %d chunk(s) agree too rarely for exact sampling at temperature %g; the batch sampler chose "
            "there.", len(rows), sampling.temperature,
        )  # fmt: skip
        rest = self.draw(
            conditions[rows], replace(sampling, sampler="batch"), [generators[row] for row in rows.tolist()]
        )
        chunk.tokens[rows] = rest.tokens
        chunk.num_drawn[rows] += rest.num_drawn
        chunk.num_decoded[rows] += rest.num_decoded
        yield chunk, torch.ones_like(accepted)


class TokenStepper(Stepper):
    """Stepper of an autoregressive model: one token a step."""

    def __init__(self, model: Any):
        check_plain_logits(model.config, "served")
        super().__init__(model, model.base_model, model.config, patch_size=1)

    def check(self, sampling: Sampling) -> None:
        if not 0 <= sampling.temperature <= 2:
            raise ValueError(
                f"temperature must be in [0, 2] for a token model, got {sampling.temperature}; 0 takes "
                "the likeliest token."
            )

    def whole_patches(self, ids: list[int]) -> list[int]:
        return ids or [min(self.end_ids, default=0)]

    def draw(self, conditions: Tensor, sampling: Sampling, generators: list[torch.Generator]) -> NextChunk:
        probs = sharpened(self.model.get_output_embeddings()(conditions), sampling.temperature)
        tokens = categorical(probs, 1, generators)
        ones = torch.ones(len(tokens), dtype=torch.long, device=tokens.device)
        return NextChunk(tokens, ones, ones)


def _end_ids(model: Any) -> set[int]:
    saved = model.generation_config.eos_token_id
    ends = saved if saved is not None else model.config.eos_token_id
    return set(ends) if isinstance(ends, list) else set() if ends is None else {ends}
