"""What the engine asks of a model: read a prompt, draw what comes next, take a step with all running sequences.

Shapes: n sequences, K tokens of a chunk (1 of a token model), D hidden.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from calm.functional.noise import categorical
from calm.functional.temperature import sharpened
from calm.models.generation import NextChunk
from calm.models.layer_access import device_of
from calm.models.modeling_calm import CalmForCausalLM
from calm.models.requirements import check_plain_logits


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
    def prefill(self, ids: list[int]) -> tuple[Tensor, Cache, int]:
        """Read a prompt: the condition ``[1, D]`` of what follows, the cache, the positions read."""

    @abstractmethod
    def draw(self, conditions: Tensor, sampling: Sampling, generators: list[torch.Generator]) -> NextChunk:
        """The next K tokens of every row of ``[n, D]``."""

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

    def prefill(self, ids: list[int]) -> tuple[Tensor, Cache, int]:
        prompt = torch.tensor([ids], dtype=torch.long, device=self.device)
        aligned, patch_mask = self.model.align_prompt(prompt)
        state = self.model.prefill(aligned, patch_mask)
        return state.hidden, state.past_key_values, patch_mask.shape[1]

    def draw(self, conditions: Tensor, sampling: Sampling, generators: list[torch.Generator]) -> NextChunk:
        return self.model.next_chunk(
            conditions, sampling.temperature, sampling.sampler, sampling.num_candidates, generators
        )


class TokenStepper(Stepper):
    """Stepper of an autoregressive model: one token a step."""

    def __init__(self, model: Any):
        check_plain_logits(model.config, "served")
        super().__init__(model, model.base_model, model.config, patch_size=1)

    def check(self, sampling: Sampling) -> None:
        if not 0 < sampling.temperature <= 2:
            raise ValueError(
                f"temperature must lie in (0, 2] for a token model, got {sampling.temperature}; close to 0 it takes "
                "the likeliest token."
            )

    def prefill(self, ids: list[int]) -> tuple[Tensor, Cache, int]:
        prompt = torch.tensor([ids or [min(self.end_ids, default=0)]], device=self.device)
        outputs = self.reader(prompt, use_cache=True)
        return outputs.last_hidden_state[:, -1], outputs.past_key_values, prompt.shape[1]

    def draw(self, conditions: Tensor, sampling: Sampling, generators: list[torch.Generator]) -> NextChunk:
        probs = sharpened(self.model.get_output_embeddings()(conditions), sampling.temperature)
        tokens = categorical(probs, 1, generators)
        ones = torch.ones(len(tokens), dtype=torch.long, device=tokens.device)
        return NextChunk(tokens, ones, ones)


def _end_ids(model: Any) -> set[int]:
    saved = model.generation_config.eos_token_id
    ends = saved if saved is not None else model.config.eos_token_id
    return set(ends) if isinstance(ends, list) else set() if ends is None else {ends}
