"""One interface to a language model: CALM and token models are prompted, stepped, sampled and scored alike.

This is the one place that tests which of the two a model is. Completions, server and evaluation work with a
:class:`ModelRunner`.

Shapes: n sequences, T tokens, K tokens of a patch (1 of a token model), D hidden, L patches of the longest context, M
of the longest continuation.
"""

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from calm.functional.rng import categorical
from calm.functional.temperature import LOWEST_TEMPERATURE, largest, sharpened
from calm.functional.tiles import rows_at_once
from calm.generation.loop import seeded_generators
from calm.generation.prompts import check_token_ids, left_padded
from calm.generation.samplers import SampledPatches, TokenLogprobs, find_sampler
from calm.generation.sampling_params import SamplingParams
from calm.generation.settings import saved_sampling
from calm.models.capabilities import check_plain_logits
from calm.models.context import context_of, positions_needed, room_for_new
from calm.models.layer_access import device_of
from calm.models.modeling_calm import CalmForCausalLM

_TILE_ELEMENTS = 2**22  # of the logits that exist at once when texts are scored on a CPU


@dataclass
class Continuations:
    """New tokens of prompts, ``[n, new]``; after its end a row has padding. The counters are those of a CALM."""

    tokens: Tensor
    num_samples: Tensor | None = None  # [n, patches]
    num_decoded: Tensor | None = None


class ModelRunner(ABC):
    """A language model as completions, server and evaluation use it.

    Attributes:
        kind: ``"calm"`` or ``"token model"``.
        patch_size: K, number of tokens of a step.
        samplers: names of the samplers that the model supports; empty for a token model, which has one way to sample.
        end_ids: the tokens that end a text.
        reader: the part of the model that reads patches, with the backbone's cache.
        context: number of positions the model was made for; None where it has no limit.
    """

    kind = ""

    def __init__(self, model: Any, reader: Any, backbone_config: Any, patch_size: int):
        self.model, self.reader, self.backbone_config, self.patch_size = model, reader, backbone_config, patch_size
        self.samplers: list[str] = []
        self.vocab_size = model.config.vocab_size
        self.end_ids = end_ids(model)
        self.dtype, self.device = model.dtype, device_of(model)
        self.context = context_of(model.config)

    def settings(self, batch_size: int) -> dict[str, Any]:
        """Return what the texts of a file depend on beside their prompts and parameters."""
        return {}

    @abstractmethod
    def check(self, params: SamplingParams) -> None:
        """Raise ValueError for parameters that the model cannot follow."""

    def resolve(self, params: SamplingParams) -> SamplingParams:
        """Return checked parameters without None: those saved with the model, or the defaults, take its place."""
        self.check(params)
        # A token model samples as `direct` does: with the rules of that sampler the parameters are checked.
        resolved = params.with_defaults(saved_sampling(self.model.generation_config))
        self.check(resolved)
        return resolved

    def check_steps(self, purpose: str) -> None:
        """Raise ValueError for a model that can generate, but whose steps cannot be run one by one."""
        return

    @abstractmethod
    def whole_patches(self, ids: list[int]) -> list[int]:
        """Return a prompt as the model reads it: whole patches, at least one."""

    def prefill(self, prompts: list[list[int]]) -> tuple[Tensor, Cache, list[int]]:
        """Read prompts of :meth:`whole_patches` together.

        Returns:
            the conditions ``[n, D]`` of the next patches, the cache, and the number of positions of each prompt in it.
        """
        # Attention is causal, so the tokens that fill up shorter prompts change nothing: no mask is needed.
        longest = max(map(len, prompts))
        ids = torch.tensor([ids + [0] * (longest - len(ids)) for ids in prompts], device=self.device)
        lengths = [len(ids) // self.patch_size for ids in prompts]
        outputs = self.reader(ids, use_cache=True)
        last = torch.tensor(lengths, device=self.device) - 1
        hidden = outputs.last_hidden_state
        return hidden[torch.arange(len(prompts), device=self.device), last], outputs.past_key_values, lengths

    @abstractmethod
    def sample(self, conditions: Tensor, params: SamplingParams, generators: Any) -> SampledPatches:
        """Sample the next K tokens of every row of ``[n, D]``; the parameters are those of :meth:`resolve`."""

    def sample_in_rounds(
        self, conditions: Tensor, params: SamplingParams, generators: Any, report: Callable[[str], None]
    ) -> Iterator[tuple[SampledPatches, Tensor]] | None:
        """Return :meth:`sample` in pieces where it may take long, as :meth:`Sampler.sample_in_rounds`."""
        return None

    def step(self, tokens: Tensor, positions: Tensor, mask: Tensor | None, cache: Cache) -> Tensor:
        """Feed patches ``[n, K]`` back at positions ``[n]``; return the next conditions ``[n, D]``."""
        outputs = self.reader(
            tokens, attention_mask=mask, position_ids=positions[:, None], past_key_values=cache, use_cache=True
        )
        return outputs.last_hidden_state[:, -1]

    @abstractmethod
    def generate(
        self,
        ids: Tensor,
        mask: Tensor,
        params: SamplingParams,
        tokenizer: Any = None,
        streamer: Any = None,
        compile: bool = False,
    ) -> Continuations:
        """Continue left-padded prompts ``[n, T]`` with the model's own ``generate``."""

    @abstractmethod
    def log_probs(
        self, conditions: Tensor, tokens: Tensor, sampler: str | None = None, num_top: int = 0
    ) -> tuple[TokenLogprobs, Tensor]:
        """Return the log-probabilities of given patches ``[n, K]`` and which tokens are the most likely, ``[n, K]``."""

    @torch.no_grad()
    def score(
        self, contexts: Sequence[Sequence[int]], continuations: Sequence[Sequence[int]], sampler: str | None = None
    ) -> list[tuple[float, bool]]:
        """Return the log-likelihood of every continuation in nats, and whether each of its tokens is the most likely.

        Args:
            contexts: token ids; aligned to patches as prompts are. An empty one is the beginning of a document.
            continuations: token ids.
            sampler: of a CALM, one with token probabilities; the likelihood is that with which it samples the text.
        """
        self.check_scoring(sampler)
        size = self.patch_size
        prompts = [self.whole_patches(list(context)) for context in contexts]
        aligned, token_mask = left_padded(prompts, 0)
        num_patches = -(-max(map(len, continuations)) // size)
        following = torch.full((len(contexts), num_patches * size), prompts[0][0])
        is_text = torch.arange(following.shape[1]) < torch.tensor([len(each) for each in continuations])[:, None]
        following[is_text] = torch.tensor([token for each in continuations for token in each], dtype=torch.long)
        masks = [part.unflatten(1, (-1, size)).amax(-1) for part in (token_mask, is_text.long())]
        mask = torch.cat(masks, dim=1).to(self.device)
        hidden = self.reader(
            torch.cat([aligned, following], dim=1).to(self.device),
            attention_mask=None if bool(mask.all()) else mask,
            position_ids=(mask.cumsum(1) - 1).clamp(min=0),
        ).last_hidden_state[:, -num_patches - 1 : -1]  # [n, M, D]
        patches = following.view(-1, size).to(self.device)
        found, is_best = self.log_probs(hidden.flatten(0, 1), patches, sampler)
        log_probs = found.tokens.cpu().view(is_text.shape).double().masked_fill(~is_text, 0)
        greedy = (is_best.cpu().view(is_text.shape) | ~is_text).all(1)
        return list(zip(log_probs.sum(1).tolist(), greedy.tolist(), strict=True))

    @abstractmethod
    def check_scoring(self, sampler: str | None) -> None:
        """Raise ValueError for a sampler without token probabilities."""


def model_runner(model: PreTrainedModel | ModelRunner) -> ModelRunner:
    """Return the runner of a CALM or of a token model; a runner is returned as it is."""
    if isinstance(model, ModelRunner):
        return model
    return CalmRunner(model) if isinstance(model, CalmForCausalLM) else TokenModelRunner(model)


class CalmRunner(ModelRunner):
    """Runner of a CALM: K tokens a step."""

    kind = "calm"

    def __init__(self, model: CalmForCausalLM):
        super().__init__(model, model, model.config.backbone_config, model.config.patch_size)
        self.samplers = model.samplers

    def check(self, params: SamplingParams) -> None:
        self.model.check_sampling(params)

    def whole_patches(self, ids: list[int]) -> list[int]:
        aligned, _ = self.model.align_prompt(torch.tensor([ids], dtype=torch.long))
        return list(aligned[0].tolist())

    def sample(self, conditions: Tensor, params: SamplingParams, generators: Any) -> SampledPatches:
        return self.model.sample_patch(conditions, params, generators)

    def sample_in_rounds(
        self, conditions: Tensor, params: SamplingParams, generators: Any, report: Callable[[str], None]
    ) -> Iterator[tuple[SampledPatches, Tensor]] | None:
        assert params.sampler is not None
        return find_sampler(params.sampler).sample_in_rounds(self.model, conditions, params, generators, report)

    def generate(
        self,
        ids: Tensor,
        mask: Tensor,
        params: SamplingParams,
        tokenizer: Any = None,
        streamer: Any = None,
        compile: bool = False,
    ) -> Continuations:
        generators = seeded_generators(params.seed or 0, len(ids), self.model.device)
        out = self.model.generate(
            ids, mask, sampling_params=dataclasses.replace(params, logprobs=None), generator=generators,
            streamer=streamer, tokenizer=tokenizer, compile=compile, return_dict_in_generate=True,
        )  # fmt: skip
        return Continuations(out.sequences[:, ids.shape[1] :], out.num_samples, out.num_decoded)

    def log_probs(
        self, conditions: Tensor, tokens: Tensor, sampler: str | None = None, num_top: int = 0
    ) -> tuple[TokenLogprobs, Tensor]:
        assert sampler is not None
        return find_sampler(sampler).score(self.model, conditions, tokens, num_top)

    def check_scoring(self, sampler: str | None) -> None:
        with_probabilities = [name for name in self.samplers if find_sampler(name).has_probabilities]
        if sampler not in with_probabilities:
            remedy = f"use sampler {' or '.join(with_probabilities)}" if with_probabilities else "it has none"
            raise ValueError(f"likelihoods need a sampler with token probabilities, got sampler {sampler}: {remedy}.")


class TokenModelRunner(ModelRunner):
    """Runner of an autoregressive token model: one token a step."""

    kind = "token model"

    def __init__(self, model: Any):
        super().__init__(model, model.base_model, model.config, patch_size=1)

    def settings(self, batch_size: int) -> dict[str, Any]:
        return {"batch_size": batch_size}  # a batch has one stream of random numbers

    def check(self, params: SamplingParams) -> None:
        if params.sampler is not None or params.num_candidates is not None:
            raise ValueError(
                "sampler and num_candidates are settings of a CALM, and this is a token model: leave them out."
            )
        if params.temperature is not None and not params.temperature >= 0:
            raise ValueError(f"temperature must be at least 0, got {params.temperature}.")

    def resolve(self, params: SamplingParams) -> SamplingParams:
        self.check(params)
        # A token model samples as `direct` does: with the rules of that sampler the parameters are checked.
        resolved = params.with_defaults(saved_sampling(self.model.generation_config) | {"sampler": "direct"})
        return dataclasses.replace(resolved, sampler=None, num_candidates=None)

    def check_steps(self, purpose: str) -> None:
        """Raise ValueError for a model whose logits are more than a product with its output embedding."""
        check_plain_logits(self.model.config, purpose)

    def whole_patches(self, ids: list[int]) -> list[int]:
        return ids or [min(self.end_ids, default=0)]

    def sample(self, conditions: Tensor, params: SamplingParams, generators: Any) -> SampledPatches:
        assert params.temperature is not None
        assert params.top_p is not None
        logits = self.model.get_output_embeddings()(conditions)
        tokens = categorical(sharpened(logits, params.temperature, params.top_p), 1, generators)
        logprobs = None
        if params.logprobs is not None:
            logprobs, _ = self.log_probs(conditions, tokens, num_top=params.logprobs)
        return SampledPatches.once(tokens, logprobs)

    def generate(
        self,
        ids: Tensor,
        mask: Tensor,
        params: SamplingParams,
        tokenizer: Any = None,
        streamer: Any = None,
        compile: bool = False,
    ) -> Continuations:
        params = self.resolve(params)
        assert params.temperature is not None
        assert params.max_new_tokens is not None
        self._check_prompts(ids, params.max_new_tokens)
        pad = {} if tokenizer is None else {"pad_token_id": tokenizer.pad_token_id}
        # transformers' generate has no generator argument.
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(params.seed or 0)
            out = self.model.generate(
                ids, attention_mask=mask, streamer=streamer, tokenizer=tokenizer, do_sample=True, top_k=0,
                top_p=params.top_p, temperature=max(params.temperature, LOWEST_TEMPERATURE),
                max_new_tokens=params.max_new_tokens, stop_strings=list(params.stop) or None, **pad,
            )  # fmt: skip
        return Continuations(out[:, ids.shape[1] :])

    def _check_prompts(self, ids: Tensor, max_new_tokens: int) -> None:
        """Raise ValueError for ids outside the vocabulary and when the context is too short, as a CALM does."""
        check_token_ids(ids, self.model.get_input_embeddings().num_embeddings)
        prompt_tokens = ids.shape[1]
        if self.context is not None and positions_needed(prompt_tokens, max_new_tokens) > self.context:
            raise ValueError(
                f"the prompt of {prompt_tokens} tokens and max_new_tokens={max_new_tokens} do not fit the model's "
                f"context of {self.context}: shorten the prompt or request at most "
                f"{room_for_new(self.context, prompt_tokens)} new tokens."
            )

    def log_probs(
        self, conditions: Tensor, tokens: Tensor, sampler: str | None = None, num_top: int = 0
    ) -> tuple[TokenLogprobs, Tensor]:
        tiles = []
        size = rows_at_once(self.vocab_size, conditions.device, _TILE_ELEMENTS)
        for state, token in zip(conditions.split(size), tokens.split(size), strict=True):
            probs = self.model.get_output_embeddings()(state).float().log_softmax(-1)
            top, top_ids = largest(probs.softmax(-1), num_top)
            is_best = probs.argmax(-1, keepdim=True) == token
            tiles.append((probs.gather(-1, token), top.log()[:, None], top_ids[:, None], is_best))
        log_probs, top, top_ids, is_best = (torch.cat(parts) for parts in zip(*tiles, strict=True))
        return TokenLogprobs(log_probs, top, top_ids), is_best

    def check_scoring(self, sampler: str | None) -> None:
        if sampler is not None:
            raise ValueError(f"sampler is a setting of a CALM, and this is a token model: got sampler {sampler}.")
        self.check_steps("scored")


def end_ids(model: Any) -> set[int]:
    """Return the ids of the tokens that end a text of a model."""
    saved = model.generation_config.eos_token_id
    ends = saved if saved is not None else model.config.eos_token_id
    return set(ends) if isinstance(ends, list) else set() if ends is None else {ends}
