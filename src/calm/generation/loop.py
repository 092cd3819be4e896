"""Generation patch by patch: one step of the backbone, one latent, K tokens.

``prefill`` reads the prompt, ``sample_patch`` samples K tokens from the last hidden state, ``extend`` feeds them back;
``generate`` is the loop around them, with the signature of transformers' ``generate``.

Shapes: B batch, T tokens, K tokens of a patch, L patches, D hidden.
"""

import dataclasses
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin
from transformers.cache_utils import Cache
from transformers.generation import MaxTimeCriteria, StoppingCriteriaList, StopStringCriteria
from transformers.generation.streamers import BaseStreamer
from transformers.utils import ModelOutput

from calm.functional.lazy_samples import LazySamples
from calm.functional.rng import Generator, check_rows, of_rows
from calm.generation.prompts import align_prompt, check_prompts
from calm.generation.samplers import SampledPatches, find_sampler, supported_samplers
from calm.generation.sampling_params import SamplingParams
from calm.generation.settings import GenerationSettings, resolve_settings
from calm.generation.static_step import StaticStep
from calm.models.context import context_of, positions_needed, room_for_new
from calm.models.layer_access import device_of


@dataclass
class GenerationState:
    """Result of a step: the condition of the next patch, and the cache after it."""

    hidden: Tensor  # [B, D]
    past_key_values: Cache
    position: Tensor  # [B, 1], of the next patch
    patch_mask: Tensor | None  # [B, L], 0 for padding before the prompt; None without padding


@dataclass
class CalmGenerateOutput(ModelOutput):
    """
    Args:
        sequences: ``[B, T + new]``, prompt and continuation.
        num_samples: samples of the head for every patch, ``[B, patches]``; 0 for rows that had ended.
        num_decoded: tokens decoded for every patch (products with the vocabulary), ``[B, patches]``.
        logprobs: with ``logprobs=n``, log-probabilities of the new tokens in nats, ``[B, new]``.
        top_logprobs, top_ids: of the n most likely tokens at every position, ``[B, new, n]``.
    """

    sequences: Tensor | None = None
    num_samples: Tensor | None = None
    num_decoded: Tensor | None = None
    logprobs: Tensor | None = None
    top_logprobs: Tensor | None = None
    top_ids: Tensor | None = None

    @property
    def num_drawn(self) -> Tensor | None:
        """Former name of ``num_samples``."""
        warnings.warn("num_drawn is named num_samples now; the old name works for one more release.", FutureWarning,
                      stacklevel=2)  # fmt: skip
        return self.num_samples


class CalmGenerationMixin:
    """``generate`` and its parts, for :class:`~calm.models.modeling_calm.CalmForCausalLM`."""

    # Attributes and methods of the model.
    generation_config: GenerationConfig
    config: Any
    head: Any
    autoencoder: Any
    mtp_head: Any
    get_input_embeddings: Callable[[], Any]
    token_matrix: Callable[[torch.device], Tensor]
    __call__: Callable[..., Any]

    adjust_generation_fn = GenerationMixin.adjust_generation_fn  # makes from_pretrained read generation_config.json

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        max_new_tokens: int | None = None,
        temperature: float | None = None,
        sampler: str | None = None,
        num_candidates: int | None = None,
        sampling_params: SamplingParams | None = None,
        num_return_sequences: int | None = None,
        generator: Generator = None,
        streamer: BaseStreamer | None = None,
        stopping_criteria: StoppingCriteriaList | None = None,
        stop_strings: str | list[str] | None = None,
        tokenizer: Any = None,
        generation_config: GenerationConfig | None = None,
        compile: bool = False,
        **kwargs,
    ) -> Tensor | CalmGenerateOutput:
        """Continue prompts of any length.

        Args:
            input_ids: prompts ``[B, T]``, left-padded; none or an empty prompt starts a new document.
            attention_mask: ``[B, T]``, 0 for the padding on the left. Without one, padding tokens at the edges of a
                prompt count as padding, as in transformers.
            max_new_tokens, temperature, sampler, num_candidates: as in
                :class:`~calm.generation.sampling_params.SamplingParams`. They and its other fields, such as ``top_p``
                and ``logprobs``, may also be passed as keyword arguments.
            sampling_params: settings that hold where the argument of the same name is None.
            num_return_sequences: number of continuations of every prompt.
            generator: source of all randomness; on one device, one seed gives one text. A list of one per sequence
                makes the text of each independent of the others. Default: from the seed of ``sampling_params``.
            streamer: receives the prompt, then every patch (one sequence only).
            stopping_criteria: called for every token in turn, with all tokens up to it.
            stop_strings: a row ends with the token that completes one of them; needs ``tokenizer``.
            generation_config: replaces the model's; arguments and ``sampling_params`` precede either.
            compile: use a static key/value cache and a compiled step. The results are the same; the first call with
                new shapes compiles.
            kwargs: further parameters of transformers' ``generate`` where they have a meaning here: ``inputs`` (the
                prompts by another name), ``max_length``, ``max_time`` (seconds), ``eos_token_id``, ``pad_token_id``,
                ``return_dict_in_generate``. Others are refused by name.

        Returns:
            ``[B, T + new]``: prompt and continuation. After its end a row has padding. With
            ``return_dict_in_generate=True`` a :class:`CalmGenerateOutput`.
        """
        device = device_of(self)
        inputs = kwargs.pop("inputs", None)
        if input_ids is not None and inputs is not None:
            raise ValueError("inputs is another name of input_ids: pass one of them.")
        input_ids = inputs if input_ids is None else input_ids
        if input_ids is None:
            input_ids = torch.empty((1, 0), dtype=torch.long)
        check_prompts(input_ids)
        input_ids = input_ids.to(device)
        attention_mask = None if attention_mask is None else attention_mask.to(device)
        arguments = kwargs | {
            "max_new_tokens": max_new_tokens,
            "temperature": temperature,
            "sampler": sampler,
            "num_candidates": num_candidates,
            "num_return_sequences": num_return_sequences,
            "stop_strings": stop_strings,
        }
        saved = generation_config or self.generation_config
        settings = resolve_settings(arguments, sampling_params, saved, self.generation_config, input_ids.shape[1])
        params = settings.params
        assert params.max_new_tokens is not None
        self.check_sampling(params)
        if params.logprobs is not None and not settings.return_dict_in_generate:
            raise ValueError("logprobs are fields of the output object: pass return_dict_in_generate=True as well.")
        if attention_mask is None and settings.prompt_padding_id is not None:
            attention_mask = _mask_of_padding(input_ids, settings.prompt_padding_id)
        aligned_ids, patch_mask = self.align_prompt(input_ids, attention_mask)
        num_patches = self._patches_needed(patch_mask.shape[1], params.max_new_tokens)
        criteria = StoppingCriteriaList(stopping_criteria or [])
        if settings.max_time is not None:
            criteria.append(MaxTimeCriteria(settings.max_time))
        if params.stop:
            if tokenizer is None:
                raise ValueError("stop_strings are compared with text: pass tokenizer= as well.")
            criteria.append(StopStringCriteria(tokenizer, list(params.stop)))
        tokens = input_ids.repeat_interleave(settings.num_return_sequences, dim=0)
        if generator is None and sampling_params is not None and sampling_params.seed is not None:
            generator = seeded_generators(sampling_params.seed, len(tokens), device)
        check_rows(generator, len(tokens))
        if streamer is not None:
            if len(tokens) > 1:
                raise ValueError(f"a streamer supports one sequence, got {len(tokens)}.")
            streamer.put(tokens.cpu())

        state = self.prefill(aligned_ids, patch_mask)
        check_finite(state.hidden)
        if settings.num_return_sequences > 1:
            state = _repeat(state, settings.num_return_sequences)
        with StaticStep.of(self, state, num_patches) if compile else nullcontext((state, self.extend)) as (state, step):
            tokens, patches = self._continue(state, step, tokens, settings, criteria, streamer, generator)
        if not settings.return_dict_in_generate:
            return tokens
        return _output(tokens, patches, tokens.shape[1] - input_ids.shape[1])

    def _continue(
        self,
        state: GenerationState,
        step: Callable[[Any, Tensor], Any],
        tokens: Tensor,
        settings: GenerationSettings,
        criteria: StoppingCriteriaList,
        streamer: BaseStreamer | None,
        generator: Generator,
    ) -> tuple[Tensor, list[SampledPatches]]:
        """Run the loop of :meth:`generate` after the prompt: ``[B, T] -> [B, T + new]``, and all sampled patches."""
        end_ids = torch.tensor(settings.end_ids, dtype=torch.long, device=tokens.device)
        finished = torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)
        unfinished: list[Tensor] = []  # for every new token, the rows that had not ended before it
        sampled: list[SampledPatches] = []
        remaining = settings.params.max_new_tokens
        assert remaining is not None
        while True:
            patches = self._sample_unfinished(state.hidden, finished, settings, generator)
            sampled.append(patches)
            new = patches.tokens[:, :remaining]
            for token in new.unbind(1):
                unfinished.append(~finished)
                tokens = torch.cat([tokens, token.masked_fill(finished, settings.pad_id)[:, None]], dim=1)
                finished = finished | torch.isin(token, end_ids)
                if criteria:
                    finished = finished | criteria(tokens, None)
            if streamer is not None:
                streamer.put(new[torch.stack(unfinished[-new.shape[1] :], dim=1)].cpu())
            remaining -= new.shape[1]
            if remaining <= 0 or bool(finished.all()):
                break
            state = step(state, patches.tokens)
            check_finite(state.hidden)
        if streamer is not None:
            streamer.end()
        # All rows may have ended inside the last patch.
        return tokens[:, : tokens.shape[1] - len(unfinished) + int(torch.stack(unfinished).any(1).sum())], sampled

    @property
    def samplers(self) -> list[str]:
        """Names of the samplers that this model supports."""
        return supported_samplers(self)

    def check_sampling(self, params: SamplingParams) -> None:
        """Raise ValueError when this model does not support the sampler."""
        if params.sampler is not None and (missing := find_sampler(params.sampler).missing(self)):
            others = " or ".join(self.samplers)
            raise ValueError(f"sampler {params.sampler} needs {missing}: use {others}.")

    def align_prompt(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Fill prompts up to whole patches with separators: ``[B, T] -> [B, L * K], patch mask [B, L]``."""
        return align_prompt(
            input_ids, attention_mask, self.config.patch_size, self.config.vocab_size, self.config.separator_id
        )

    def prefill(self, aligned_ids: Tensor, patch_mask: Tensor) -> GenerationState:
        """Read whole patches, as :meth:`align_prompt` returns them: ``[B, L * K], [B, L]``."""
        # Without padding no mask is passed: the backbone would check it, and wait for the device, at every step.
        mask = None if bool(patch_mask.all()) else patch_mask
        outputs = self(
            aligned_ids,
            attention_mask=mask,
            position_ids=(patch_mask.cumsum(1) - 1).clamp(min=0),
            use_cache=True,
        )
        position = patch_mask.sum(1, keepdim=True)
        return GenerationState(outputs.last_hidden_state[:, -1], outputs.past_key_values, position, mask)

    def extend(self, state: GenerationState, patch: Tensor) -> GenerationState:
        """Feed a patch ``[B, K]`` back: one step of the backbone."""
        mask = state.patch_mask
        if mask is not None:
            mask = torch.cat([mask, mask.new_ones(len(patch), 1)], dim=1)
        outputs = self(
            patch,
            attention_mask=mask,
            position_ids=state.position,
            past_key_values=state.past_key_values,
            use_cache=True,
        )
        return GenerationState(outputs.last_hidden_state[:, -1], outputs.past_key_values, state.position + 1, mask)

    def sample_patch(self, hidden: Tensor, params: SamplingParams, generator: Generator = None) -> SampledPatches:
        """Sample the K tokens that follow hidden states ``[B, D]``.

        Args:
            params: without None, as :meth:`SamplingParams.with_defaults` returns them, and accepted by
                :meth:`check_sampling`. They are not checked again, because this runs once per patch.
        """
        assert params.sampler is not None
        return find_sampler(params.sampler).sample(self, hidden, params, generator)

    def lazy_samples(self, hidden: Tensor, generator: Generator = None) -> LazySamples:
        """Return samples of the patch after hidden states ``[B, D]`` at temperature 1, decoded when needed."""
        decoder = self.autoencoder.decoder

        def sample(rows: Tensor, count: int, generator: Generator) -> Tensor:
            latents = self.head.sample(hidden[rows], generator=generator, num_samples=count)  # [count, R, Z]
            return decoder.patch_states(latents).movedim(0, 1)

        def decode(states: Tensor, start: int, stop: int) -> Tensor:
            return self.autoencoder.best_tokens(decoder.token_states(states, start, stop)).to(hidden.device)

        return LazySamples(sample, decode, len(hidden), self.config.patch_size, generator, hidden.device)

    def _sample_unfinished(
        self, hidden: Tensor, finished: Tensor, settings: GenerationSettings, generator: Generator
    ) -> SampledPatches:
        """Sample the next patches; rows that have ended get padding, and nothing is computed for them."""
        rows = (~finished).nonzero()[:, 0]
        sampled = self.sample_patch(hidden[rows], settings.params, of_rows(generator, rows))
        if len(rows) == len(hidden):
            return sampled
        patches = SampledPatches.empty(
            len(hidden), self.config.patch_size, hidden.device, settings.pad_id, settings.params.logprobs
        )
        patches.put(rows, sampled)
        return patches

    def _patches_needed(self, num_patches: int, max_new_tokens: int) -> int:
        """Return the positions that prompt and continuation need; ValueError when the context has fewer."""
        context, patch_size = context_of(self.config), self.config.patch_size
        needed = positions_needed(num_patches * patch_size, max_new_tokens, patch_size)
        if context is not None and needed > context:
            raise ValueError(
                f"the prompt and max_new_tokens={max_new_tokens} need {needed} patches of {patch_size} tokens, but the "
                f"model's context has {context}: shorten the prompt or request at most "
                f"{room_for_new(context, num_patches * patch_size, patch_size)} new tokens."
            )
        return needed


def check_finite(hidden: Tensor) -> None:
    """Raise ValueError for hidden states that are not finite."""
    if not bool(hidden.isfinite().all()):
        raise ValueError("the model gives NaN or infinity: its weights are damaged, or its training diverged.")


def _mask_of_padding(input_ids: Tensor, padding: int) -> Tensor | None:
    """Return a mask ``[B, T]``; None where no row begins or ends with padding."""
    is_text = input_ids.ne(padding)
    has_padding = input_ids.shape[1] > 0 and not bool((is_text[:, 0] & is_text[:, -1]).all())
    return is_text.long() if has_padding else None


def seeded_generators(seed: int, num_rows: int, device: torch.device) -> list[torch.Generator]:
    """Return a generator for every row; row i has the seed ``seed + i``."""
    return [torch.Generator(device).manual_seed(seed + row) for row in range(num_rows)]


def _output(sequences: Tensor, patches: list[SampledPatches], num_new: int) -> CalmGenerateOutput:
    """Return the output object of ``generate``."""
    output = CalmGenerateOutput(
        sequences,
        torch.stack([patch.num_samples for patch in patches], dim=1),
        torch.stack([patch.num_decoded for patch in patches], dim=1),
    )
    if patches[0].logprobs is None:
        return output
    logprobs = [patch.logprobs for patch in patches if patch.logprobs is not None]
    return dataclasses.replace(
        output,
        logprobs=torch.cat([part.tokens for part in logprobs], dim=1)[:, :num_new],
        top_logprobs=torch.cat([part.top for part in logprobs], dim=1)[:, :num_new],
        top_ids=torch.cat([part.top_ids for part in logprobs], dim=1)[:, :num_new],
    )


def _repeat(state: GenerationState, times: int) -> GenerationState:
    """Repeat every row ``times`` times."""
    state.past_key_values.batch_repeat_interleave(times)
    mask = state.patch_mask
    return GenerationState(
        state.hidden.repeat_interleave(times, dim=0),
        state.past_key_values,
        state.position.repeat_interleave(times, dim=0),
        None if mask is None else mask.repeat_interleave(times, dim=0),
    )
