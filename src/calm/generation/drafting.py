"""Generation with a drafter: the target verifies several drafted tokens in one pass; its distribution does not change.

A round: the drafter proposes G tokens, the target reads the last known token and the draft in one pass, the
verification accepts a prefix and samples one more token. Rows of a batch accept different numbers of tokens: the
key/value cache keeps as many positions as the row with the most, and a mask hides what the others rejected. Every row
drafts the same number of tokens in every round, so that its text does not depend on its neighbours.

Shapes: B rows, T tokens, G drafted tokens, F features, V vocabulary.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from calm.functional.rng import Generator, check_rows, pick, uniform
from calm.functional.speculative import verify_chain
from calm.functional.temperature import sharpened
from calm.generation.draft_length import AdaptiveDraftLength
from calm.generation.model_runner import end_ids
from calm.models.capabilities import check_full_attention
from calm.models.context import context_of
from calm.models.drafters.base import Draft, Drafter
from calm.models.layer_access import has_adapter


@dataclass
class DraftStatistics:
    """Counts over all rows and rounds; a round of a row that has ended does not count.

    Args:
        num_verifications: rows times passes of the target after the prompt.
        num_drafted: drafted tokens.
        num_accepted: drafted tokens that were accepted.
    """

    num_verifications: int = 0
    num_drafted: int = 0
    num_accepted: int = 0

    @property
    def tokens_per_verification(self) -> float:
        """Tokens that one pass of the target yields for one row, 1 without drafting."""
        return 1 + self.num_accepted / max(self.num_verifications, 1)


@dataclass
class DraftedText:
    """Result of :func:`generate_with_drafter`.

    Args:
        sequences: prompts and continuations, ``[B, T + new]``; after the end of a text padding.
        statistics: what the drafts were worth.
    """

    sequences: Tensor
    statistics: DraftStatistics = field(default_factory=DraftStatistics)


@torch.no_grad()
def generate_with_drafter(
    target: PreTrainedModel,
    drafter: Drafter,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    num_draft_tokens: int | AdaptiveDraftLength | None = None,
    generator: Generator = None,
    on_tokens: Callable[[list[list[int]]], bool] | None = None,
    top_p: float = 1.0,
    stop: Callable[[int, list[int]], int | None] | None = None,
) -> DraftedText:
    """Continue prompts as ``target.generate`` would, with fewer passes of the target.

    Args:
        target: a causal language model with a dense key/value cache.
        drafter: attached to the target.
        input_ids: prompts, ``[B, T]``, left-padded.
        attention_mask: ``[B, T]``, 0 for padding; None if there is no padding.
        max_new_tokens: tokens to add at most.
        temperature: of the target, at least 0; 0 is greedy decoding.
        num_draft_tokens: tokens of a draft; default as many as the drafter gives. An adaptive length is chosen anew for
            every round, and may serve several calls; sampled text then depends on measured times, greedy text does not.
        generator: source of all randomness; a list of one per row makes each text independent of the others.
        on_tokens: called after every round with the new tokens of every row; True ends generation.
        top_p: in [0, 1]; sample from the most likely tokens of the target that have this probability together.
        stop: called with the number of a row and its new tokens; returns how many of them belong to its text if it
            ends with them, or None.
    """
    check_target(target)
    check_rows(generator, len(input_ids))
    adaptive = num_draft_tokens if isinstance(num_draft_tokens, AdaptiveDraftLength) else None
    longest = _longest_draft(drafter, num_draft_tokens)
    if input_ids.shape[1] == 0:
        raise ValueError("the prompt is empty: a drafter needs at least one token to read.")
    context = context_of(target.config.get_text_config())
    if context is not None and input_ids.shape[1] + max_new_tokens + longest > context:
        raise ValueError(
            f"{input_ids.shape[1]} tokens of the prompt, {max_new_tokens} new ones and drafts of {longest} "
            f"do not fit the context of {context} tokens: shorten the prompt or ask for fewer tokens."
        )
    texts = _Texts(target, drafter, input_ids, attention_mask, temperature, generator, top_p)
    statistics = DraftStatistics()
    ends = end_ids(target)
    new: list[list[int]] = [[] for _ in range(len(input_ids))]
    is_running = [True] * len(new)
    rounds = texts.start()
    while True:
        added = [
            up_to_end(row[: max_new_tokens - len(text)], ends) if running else []
            for row, text, running in zip(rounds, new, is_running, strict=True)
        ]
        for index, row in enumerate(added):
            ended = bool(row) and row[-1] in ends
            if stop is not None and row and (count := stop(index, row)) is not None:
                row, ended = row[:count], True
                added[index] = row
            new[index] += row
            is_running[index] = is_running[index] and not ended and len(new[index]) < max_new_tokens
        if (on_tokens is not None and on_tokens(added)) or not any(is_running):
            break
        length, start = longest if adaptive is None else adaptive.choose(), time.perf_counter()
        rounds = texts.round(length)
        accepted = [len(row) - 1 for row, running in zip(rounds, is_running, strict=True) if running]
        if adaptive is not None:
            adaptive.record(length, time.perf_counter() - start, accepted)
        statistics.num_verifications += len(accepted)
        statistics.num_drafted += length * len(accepted)
        statistics.num_accepted += sum(accepted)
    return DraftedText(_padded(input_ids, new, target), statistics)


def _longest_draft(drafter: Drafter, num_draft_tokens: int | AdaptiveDraftLength | None) -> int:
    most = drafter.config.num_tokens
    if num_draft_tokens is None:
        return most
    longest = num_draft_tokens.longest if isinstance(num_draft_tokens, AdaptiveDraftLength) else num_draft_tokens
    if not 1 <= longest <= most:
        raise ValueError(f"num_draft_tokens must be in [1, {most}] for this drafter, got {longest}.")
    return longest


class _Texts:
    """The texts of a batch: the target's cache, which of its positions count, and the last known tokens."""

    def __init__(
        self,
        target: PreTrainedModel,
        drafter: Drafter,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        temperature: float,
        generator: Generator,
        top_p: float,
    ):
        self.top_p = top_p
        self.target, self.drafter, self.input_ids = target, drafter, input_ids
        self.temperature, self.generator = temperature, generator
        self.mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        self.has_gaps = not bool(self.mask.all())
        self.cache = DynamicCache(config=target.config)
        self.state = drafter.new_state(len(input_ids))
        self.rows = torch.arange(len(input_ids), device=input_ids.device)
        self.token_ids: Tensor  # known and not yet read by the target, [B]
        self.features: Tensor  # of the position before them, [B, F]

    def start(self) -> list[list[int]]:
        """Read the prompts, and return the first token of every row."""
        position = (self.mask.cumsum(1) - 1).clamp(min=0)
        features, logits = self._read(self.input_ids, position, keep=1)
        probs = self._probs(logits[:, -1])
        self.token_ids = pick(probs, self._uniform(1))[:, 0]
        self.features = features[:, -1]
        next_ids = torch.cat([self.input_ids[:, 1:], self.token_ids[:, None]], dim=1)
        if self.state is not None:
            # A drafter with a state wants the texts without padding before them.
            lengths = self.mask.sum(1)
            shift = (self.mask.shape[1] - lengths)[:, None] + torch.arange(self.mask.shape[1], device=lengths.device)
            shift = shift.clamp(max=self.mask.shape[1] - 1)
            aligned = features.gather(1, shift[..., None].expand(-1, -1, features.shape[-1]))
            self.drafter.extend(self.state, aligned, next_ids.gather(1, shift), lengths)
        return [[token] for token in self.token_ids.tolist()]

    def round(self, num_tokens: int) -> list[list[int]]:
        """Draft, verify, and return the new tokens of every row: accepted ones and one more."""
        draft = self._propose(num_tokens)
        read = torch.cat([self.token_ids[:, None], draft.tokens], dim=1)  # [B, G + 1]
        old = self.mask
        position = old.sum(1, keepdim=True) + torch.arange(read.shape[1], device=read.device)
        self.mask = torch.cat([old, torch.ones_like(read)], dim=1)
        features, logits = self._read(read, position, keep=read.shape[1])
        verified = verify_chain(
            self._probs(logits), draft.tokens, self._draft_probs(draft, logits.shape[-1]), self._uniform(read.shape[1])
        )
        accepted = verified.num_accepted
        counts = accepted.tolist()  # the one read of the device in a round
        longest = max(counts) + 1
        if longest < read.shape[1]:
            self.cache.crop(longest - read.shape[1])
        kept = torch.arange(longest, device=read.device) <= accepted[:, None]
        self.mask = torch.cat([old, kept.long()], dim=1)
        self.has_gaps = self.has_gaps or min(counts) + 1 < longest
        tokens = torch.cat([draft.tokens, verified.next_token[:, None]], dim=1)
        tokens[self.rows, accepted] = verified.next_token
        if self.state is not None:
            self.drafter.extend(self.state, features[:, :longest], tokens[:, :longest], accepted + 1)
        self.token_ids, self.features = verified.next_token, features[self.rows, accepted]
        return [row[: count + 1] for row, count in zip(tokens.tolist(), counts, strict=True)]

    def _propose(self, num_tokens: int) -> Draft:
        if num_tokens == 0:
            return Draft(self.token_ids.new_empty(len(self.rows), 0), None)
        return self.drafter.propose(
            self.features, self.token_ids, self.temperature, num_tokens, self.generator, self.state
        )

    def _read(self, ids: Tensor, position: Tensor, keep: int) -> tuple[Tensor, Tensor]:
        """Return features ``[B, n, F]`` of new tokens, and logits of the last ``keep`` of them."""
        outputs = self.target(
            input_ids=ids,
            attention_mask=self.mask if self.has_gaps else None,
            position_ids=position,
            past_key_values=self.cache,
            use_cache=True,
            output_hidden_states=True,
            logits_to_keep=keep,
        )
        layers = [outputs.hidden_states[index] for index in self.drafter.config.feature_layers]
        return torch.cat(layers, dim=-1), outputs.logits

    def _probs(self, logits: Tensor) -> Tensor:
        if self.temperature == 0:
            return F.one_hot(logits.argmax(-1), logits.shape[-1]).float()
        return sharpened(logits, self.temperature, self.top_p)

    def _draft_probs(self, draft: Draft, vocab_size: int) -> Tensor | None:
        if draft.probs is None:
            return None
        probs = draft.probs.new_zeros(*draft.tokens.shape, vocab_size)
        return probs.index_copy_(-1, self.drafter.shortlist, draft.probs)

    def _uniform(self, count: int) -> Tensor:
        return uniform((len(self.rows), count), self.generator, self.rows.device, row_dim=0)


def check_target(target: Any) -> None:
    """Raise ValueError for a model whose text cannot be verified: one without a cache of all past tokens."""
    config = target.config.get_text_config()
    if hasattr(target, "head"):
        raise ValueError("a CALM predicts several tokens in a step by itself: give a token model as target.")
    if getattr(target.config, "is_encoder_decoder", False):
        raise ValueError(f"a drafter needs a decoder-only target, got a {config.model_type}.")
    if getattr(target, "_is_stateful", False):
        raise ValueError(
            f"a {config.model_type} has a recurrent state instead of a cache of past tokens, so rejected tokens cannot "
            "be taken back: generate without a drafter."
        )
    if has_adapter(target):
        raise ValueError(
            "a drafter was trained for a model without adapters, and this model has an adapter: merge it "
            "(merge_and_unload of peft) and train a drafter for the result, or generate without one."
        )
    check_full_attention(config, "verified with a drafter")


def up_to_end(tokens: list[int], ends: set[int]) -> list[int]:
    """Return tokens up to and including the first that ends a text."""
    stop = next((index + 1 for index, token in enumerate(tokens) if token in ends), len(tokens))
    return tokens[:stop]


def _padded(input_ids: Tensor, new: list[list[int]], target: Any) -> Tensor:
    padding = target.generation_config.pad_token_id
    if padding is None:
        padding = min(end_ids(target), default=0)
    longest = max(map(len, new))
    rows = torch.tensor([row + [padding] * (longest - len(row)) for row in new], device=input_ids.device)
    return torch.cat([input_ids, rows], dim=1)
