"""Continuations of a token model with a drafter: completions use it as they use a model."""

import dataclasses
import os
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.generation import StopStringCriteria

from calm.generation.draft_length import AdaptiveDraftLength
from calm.generation.drafting import DraftStatistics, check_target, generate_with_drafter
from calm.generation.loop import seeded_generators
from calm.generation.model_runner import Continuations, TokenModelRunner
from calm.generation.prompts import left_padded
from calm.generation.sampling_params import SamplingParams
from calm.models.drafters import load_drafter


class DraftedRunner(TokenModelRunner):
    """Runner of a token model with a drafter; text i of a call has the random numbers of ``seed + i``.

    Attributes:
        statistics: counts of all calls.
    """

    def __init__(self, model: PreTrainedModel, drafter: str | os.PathLike):
        check_target(model)
        super().__init__(model)
        self.path = str(drafter)
        self.drafter = load_drafter(drafter).to(self.device).attach(model)  # type: ignore[arg-type]
        if self.context is not None:
            self.context -= self.drafter.config.num_tokens  # the last draft may be longer than the text
        self.statistics = DraftStatistics()
        self._lengths: dict[int, AdaptiveDraftLength] = {}  # by batch size

    def settings(self, batch_size: int) -> dict[str, Any]:
        return {"drafter": self.path}

    def generate(
        self,
        ids: Tensor,
        mask: Tensor,
        params: SamplingParams,
        tokenizer: Any = None,
        streamer: Any = None,
        compile: bool = False,
    ) -> Continuations:
        if compile:
            raise ValueError("--compile has no effect with a drafter: leave it out.")
        params = self.resolve(params)
        assert params.temperature is not None
        assert params.top_p is not None
        assert params.max_new_tokens is not None
        self._check_prompts(ids, params.max_new_tokens)
        new: list[list[int]] = [[] for _ in ids]
        if streamer is not None:
            streamer.put(ids.cpu())

        def collect(added: list[list[int]]) -> bool:
            for row, tokens in zip(new, added, strict=True):
                row += tokens
            if streamer is not None and added[0]:
                streamer.put(torch.tensor(added[0]))
            return False

        result = generate_with_drafter(
            self.model, self.drafter, ids, mask, max_new_tokens=params.max_new_tokens, temperature=params.temperature,
            top_p=params.top_p, generator=seeded_generators(params.seed or 0, len(ids), self.device),
            num_draft_tokens=self._draft_length(len(ids)) if params.temperature == 0 else None,
            on_tokens=collect, stop=StopTexts(tokenizer, params.stop, ids.tolist()) if params.stop else None,
        )  # fmt: skip
        if streamer is not None:
            streamer.end()
        for field in dataclasses.fields(DraftStatistics):
            total = getattr(self.statistics, field.name) + getattr(result.statistics, field.name)
            setattr(self.statistics, field.name, total)
        padding = getattr(tokenizer, "pad_token_id", None)
        tokens, _ = left_padded(
            [row[::-1] for row in new], min(self.end_ids, default=0) if padding is None else padding
        )
        return Continuations(tokens.flip(1))

    def _draft_length(self, batch_size: int) -> AdaptiveDraftLength:
        """Return the length for greedy text. Sampled text is a function of the seed, so its drafts have a fixed one."""
        return self._lengths.setdefault(batch_size, AdaptiveDraftLength(self.drafter.config.num_tokens))

    def summary(self) -> str:
        """Return a line with the counts."""
        counts = self.statistics
        return (
            f"{counts.tokens_per_verification:.2f} tokens per pass of the model ({counts.num_drafted} drafted, "
            f"{counts.num_accepted} accepted)"
        )


class StopTexts:
    """Find the token that completes a stop text, in rows that grow by several tokens at a time.

    Args:
        prompts: token ids of every row; a stop text may begin in them, as in ``generate`` of transformers.
    """

    def __init__(self, tokenizer: Any, stop: tuple[str, ...], prompts: list[list[int]]):
        self.criteria = StopStringCriteria(tokenizer, list(stop))
        self.texts = [list(prompt) for prompt in prompts]

    def __call__(self, row: int, tokens: list[int]) -> int | None:
        """Add tokens to a row; return how many of them belong to it if it ends, or None."""
        text = self.texts[row]
        for count, token in enumerate(tokens, start=1):
            text.append(token)
            if bool(self.criteria(torch.tensor([text]), None)):
                return count
        return None
