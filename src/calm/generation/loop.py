"""Generation chunk by chunk: one step of the backbone, one latent, K tokens.

``prefill`` reads the prompt, ``next_chunk`` draws K tokens from the last hidden state, ``extend`` feeds them back;
``generate`` is the loop around them, with the signature transformers users know.

Shapes: B batch, T tokens, K tokens of a patch, L patches, D hidden.
"""

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

from calm.functional.lazy_samples import Draws
from calm.functional.rng import Generator, check_rows, of_rows
from calm.functional.temperature import sample_batch, sample_exact
from calm.generation.prompts import align_prompt, check_prompts
from calm.generation.settings import SAMPLERS, GenerationSettings, check_sampler, resolve_settings
from calm.generation.static_step import StaticStep
from calm.models.context import context_of, positions_needed, room_for_new
from calm.models.layer_access import device_of


@dataclass
class GenerationState:
    """What a step hands to the next: the condition of the next patch and the cache behind it."""

    hidden: Tensor  # [B, D]
    past_key_values: Cache
    position: Tensor  # [B, 1], of the next patch
    patch_mask: Tensor | None  # [B, L], 0 for padding in front; None without padding


@dataclass
class NextChunk:
    """K tokens of every row, and what they took: draws and products with the vocabulary."""

    tokens: Tensor  # [B, K]
    num_drawn: Tensor  # [B]
    num_decoded: Tensor  # [B]


@dataclass
class CalmGenerateOutput(ModelOutput):
    """
    Args:
        sequences: ``[B, T + new]``, prompt and continuation.
        num_drawn: draws of every chunk, ``[B, chunks]``; 0 for rows that had ended.
        num_decoded: tokens decoded for every chunk (products with the vocabulary), ``[B, chunks]``.
    """

    sequences: Tensor | None = None
    num_drawn: Tensor | None = None
    num_decoded: Tensor | None = None


class CalmGenerationMixin:
    """``generate`` and its parts, for :class:`~calm.models.modeling_calm.CalmForCausalLM`."""

    # What the model brings.
    generation_config: GenerationConfig
    config: Any
    head: Any
    autoencoder: Any
    token_predictor: Any
    get_input_embeddings: Callable[[], Any]
    token_matrix: Callable[[torch.device], Tensor]
    __call__: Callable[..., Any]

    adjust_generation_fn = GenerationMixin.adjust_generation_fn  # lets from_pretrained read generation_config.json

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
                prompt are taken for padding, as transformers does.
            max_new_tokens: tokens to add at most; need not be a multiple of K.
            temperature: in (0, 1]. A chunk's probability to the power of 1 / temperature, up to a constant; of
                ``sampler="token_prediction"`` each token's, and then it may be above 1.
            sampler: ``"batch"`` chooses among ``num_candidates`` draws (fast, approximate); ``"exact"`` draws until
                enough of them agree (exact, but its cost grows fast as the temperature falls). ``"token_prediction"``
                leaves the head out: the tokens of a chunk are drawn from what token prediction taught the hidden state
                to say of them. ``"direct"``, for a categorical flow head, sharpens the predicted probabilities of
                every pass; it needs one sample at any temperature, and 0 is greedy decoding.
            num_candidates: N of the batch sampler, and of the exact sampler's fallback.
            num_return_sequences: continuations of every prompt.
            generator: source of all randomness; on one device, one seed gives one text. A list of one per sequence
                makes the text of each independent of the others.
            streamer: receives the prompt, then every chunk (one sequence only).
            stopping_criteria: asked for every token in turn, with all tokens up to it.
            stop_strings: a row ends with the token that completes one of them; needs ``tokenizer``.
            generation_config: replaces the model's; the arguments above come before either.
            compile: a static key/value cache and a compiled step. Changes the speed alone; the first call with
                new shapes compiles.
            kwargs: further parameters of transformers' ``generate`` where they have a meaning here: ``inputs`` (the
                prompts by another name), ``max_length``, ``max_time`` (seconds), ``eos_token_id``, ``pad_token_id``,
                ``return_dict_in_generate``. Others are refused by name.

        Returns:
            ``[B, T + new]``: prompt and continuation. Behind its end a row holds padding. With
            ``return_dict_in_generate=True`` a :class:`CalmGenerateOutput`.
        """
        device = device_of(self)
        inputs = kwargs.pop("inputs", None)
        if input_ids is not None and inputs is not None:
            raise ValueError("inputs is another name of input_ids: give one of them.")
        input_ids = inputs if input_ids is None else input_ids
        if input_ids is None:
            input_ids = torch.empty((1, 0), dtype=torch.long)
        check_prompts(input_ids)
        input_ids = input_ids.to(device)
        attention_mask = None if attention_mask is None else attention_mask.to(device)
        given = kwargs | {
            "max_new_tokens": max_new_tokens,
            "temperature": temperature,
            "sampler": sampler,
            "num_candidates": num_candidates,
            "num_return_sequences": num_return_sequences,
            "stop_strings": stop_strings,
        }
        saved = generation_config or self.generation_config
        settings = resolve_settings(given, saved, self.generation_config, input_ids.shape[1])
        self.check_sampling(settings.temperature, settings.sampler, settings.num_candidates)
        if attention_mask is None and settings.prompt_padding_id is not None:
            attention_mask = _mask_of_padding(input_ids, settings.prompt_padding_id)
        aligned_ids, patch_mask = self.align_prompt(input_ids, attention_mask)
        num_patches = self._patches_needed(patch_mask.shape[1], settings.max_new_tokens)
        criteria = StoppingCriteriaList(stopping_criteria or [])
        if settings.max_time is not None:
            criteria.append(MaxTimeCriteria(settings.max_time))
        if settings.stop_strings:
            if tokenizer is None:
                raise ValueError("stop_strings are compared with text: pass tokenizer= as well.")
            criteria.append(StopStringCriteria(tokenizer, settings.stop_strings))
        tokens = input_ids.repeat_interleave(settings.num_return_sequences, dim=0)
        check_rows(generator, len(tokens))
        if streamer is not None:
            if len(tokens) > 1:
                raise ValueError(f"a streamer takes one sequence, got {len(tokens)}.")
            streamer.put(tokens.cpu())

        state = self.prefill(aligned_ids, patch_mask)
        check_finite(state.hidden)
        if settings.num_return_sequences > 1:
            state = _repeat(state, settings.num_return_sequences)
        with StaticStep.of(self, state, num_patches) if compile else nullcontext((state, self.extend)) as (state, step):
            tokens, effort = self._continue(state, step, tokens, settings, criteria, streamer, generator)
        if not settings.return_dict_in_generate:
            return tokens
        return CalmGenerateOutput(
            tokens,
            torch.stack([chunk.num_drawn for chunk in effort], dim=1),
            torch.stack([chunk.num_decoded for chunk in effort], dim=1),
        )

    def _continue(
        self,
        state: GenerationState,
        step: Callable[[Any, Tensor], Any],
        tokens: Tensor,
        settings: GenerationSettings,
        criteria: StoppingCriteriaList,
        streamer: BaseStreamer | None,
        generator: Generator,
    ) -> tuple[Tensor, list[NextChunk]]:
        """The loop of :meth:`generate` behind the prompt: ``[B, T] -> [B, T + new]``, and what every chunk took."""
        end_ids = torch.tensor(settings.end_ids, dtype=torch.long, device=tokens.device)
        finished = torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)
        going: list[Tensor] = []  # of every new token, the rows that had not ended before it
        effort: list[NextChunk] = []
        remaining = settings.max_new_tokens
        while True:
            chunk = self._next_of_unfinished(state.hidden, finished, settings, generator)
            effort.append(chunk)
            new = chunk.tokens[:, :remaining]
            for token in new.unbind(1):
                going.append(~finished)
                tokens = torch.cat([tokens, token.masked_fill(finished, settings.pad_id)[:, None]], dim=1)
                finished = finished | torch.isin(token, end_ids)
                if criteria:
                    finished = finished | criteria(tokens, None)
            if streamer is not None:
                streamer.put(new[torch.stack(going[-new.shape[1] :], dim=1)].cpu())
            remaining -= new.shape[1]
            if remaining <= 0 or bool(finished.all()):
                break
            state = step(state, chunk.tokens)
            check_finite(state.hidden)
        if streamer is not None:
            streamer.end()
        # All rows may have ended inside the last chunk.
        return tokens[:, : tokens.shape[1] - len(going) + int(torch.stack(going).any(1).sum())], effort

    @property
    def samplers(self) -> list[str]:
        """Names that :meth:`generate` accepts as ``sampler`` for this model."""
        missing = set()
        if not self.config.token_prediction_weight:
            missing.add("token_prediction")
        if not self.head.has_log_prob:
            missing.add("direct")
        return [name for name in SAMPLERS if name not in missing]

    def check_sampling(self, temperature: float, sampler: str, num_candidates: int) -> None:
        """ValueError for settings of :meth:`next_chunk` that this model cannot follow."""
        check_sampler(sampler, temperature, num_candidates)
        if sampler not in self.samplers and sampler == "direct":
            raise ValueError(
                "sampler direct needs a head with token probabilities (categorical_flow), and this model has a "
                f"{self.config.head_config.type} head: use {' or '.join(self.samplers)}."
            )
        if sampler not in self.samplers:
            raise ValueError(
                "sampler token_prediction draws from what token prediction taught a model, and this one was trained "
                "without it (model.token_prediction_weight in its recipe): take batch or exact."
            )

    def align_prompt(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Whole patches with document separators in front: ``[B, T] -> [B, L * K], patch mask [B, L]``."""
        return align_prompt(
            input_ids, attention_mask, self.config.patch_size, self.config.vocab_size, self.config.separator_id
        )

    def prefill(self, aligned_ids: Tensor, patch_mask: Tensor) -> GenerationState:
        """Read whole patches, as :meth:`align_prompt` gives them: ``[B, L * K], [B, L]``."""
        # Without padding no mask at all: the backbone would look through it, and wait for the device, at every step.
        mask = None if bool(patch_mask.all()) else patch_mask
        outputs = self(
            aligned_ids,
            attention_mask=mask,
            position_ids=(patch_mask.cumsum(1) - 1).clamp(min=0),
            use_cache=True,
        )
        position = patch_mask.sum(1, keepdim=True)
        return GenerationState(outputs.last_hidden_state[:, -1], outputs.past_key_values, position, mask)

    def extend(self, state: GenerationState, chunk: Tensor) -> GenerationState:
        """Feed a chunk ``[B, K]`` back: one step of the backbone."""
        mask = state.patch_mask
        if mask is not None:
            mask = torch.cat([mask, mask.new_ones(len(chunk), 1)], dim=1)
        outputs = self(
            chunk,
            attention_mask=mask,
            position_ids=state.position,
            past_key_values=state.past_key_values,
            use_cache=True,
        )
        return GenerationState(outputs.last_hidden_state[:, -1], outputs.past_key_values, state.position + 1, mask)

    def next_chunk(
        self,
        hidden: Tensor,
        temperature: float = 1.0,
        sampler: str = "batch",
        num_candidates: int = 200,
        generator: Generator = None,
    ) -> NextChunk:
        """Draw the K tokens that follow hidden states ``[B, D]``; settings as :meth:`check_sampling` takes them."""
        self.check_sampling(temperature, sampler, num_candidates)
        if sampler == "token_prediction":
            embeddings = self.token_matrix(hidden.device)
            return _drawn_once(self.token_predictor.draw(hidden, embeddings, temperature, generator))
        if sampler == "direct":
            latents = self.head.sample(hidden, generator=generator, temperature=temperature)
            return _drawn_once(self.autoencoder.decode_tokens(latents))
        if temperature == 1:
            tokens = self.autoencoder.decode_tokens(self.head.sample(hidden, generator=generator))
            return _drawn_once(tokens.to(hidden.device))
        draws = self.draws(hidden, generator)
        if sampler == "batch":
            tokens = sample_batch(draws, temperature, num_candidates)
            return NextChunk(tokens, draws.num_drawn, draws.num_decoded)
        tokens, accepted = sample_exact(draws, temperature)
        chunk = NextChunk(tokens, draws.num_drawn, draws.num_decoded)
        if not accepted.all():
            warnings.warn(
                f"the draws of {int((~accepted).sum())} chunk(s) agree too rarely for exact sampling at temperature "
                f"{temperature}; the batch sampler took over there.",
                stacklevel=2,
            )
            rows = (~accepted).nonzero()[:, 0]
            rest = self.next_chunk(hidden[rows], temperature, "batch", num_candidates, of_rows(generator, rows))
            chunk.tokens[rows] = rest.tokens
            chunk.num_drawn[rows] += rest.num_drawn
            chunk.num_decoded[rows] += rest.num_decoded
        return chunk

    def draws(self, hidden: Tensor, generator: Generator = None) -> Draws:
        """The next chunk of hidden states ``[B, D]`` as a source of draws at temperature 1."""
        decoder = self.autoencoder.decoder

        def draw(rows: Tensor, count: int, generator: Generator) -> Tensor:
            latents = self.head.sample(hidden[rows], generator=generator, num_samples=count)  # [count, R, Z]
            return decoder.patch_states(latents).movedim(0, 1)

        def decode(states: Tensor, start: int, stop: int) -> Tensor:
            return self.autoencoder.best_tokens(decoder.token_states(states, start, stop)).to(hidden.device)

        return Draws(draw, decode, len(hidden), self.config.patch_size, generator, hidden.device)

    def _next_of_unfinished(
        self, hidden: Tensor, finished: Tensor, settings: GenerationSettings, generator: Generator
    ) -> NextChunk:
        """The next chunk; rows that have ended get padding and cost nothing."""
        rows = (~finished).nonzero()[:, 0]
        some = self.next_chunk(
            hidden[rows], settings.temperature, settings.sampler, settings.num_candidates, of_rows(generator, rows)
        )
        if len(rows) == len(hidden):
            return some
        chunk = NextChunk(
            some.tokens.new_full((len(hidden), self.config.patch_size), settings.pad_id),
            torch.zeros_like(finished, dtype=torch.long),
            torch.zeros_like(finished, dtype=torch.long),
        )
        chunk.tokens[rows], chunk.num_drawn[rows], chunk.num_decoded[rows] = (
            some.tokens, some.num_drawn, some.num_decoded,
        )  # fmt: skip
        return chunk

    def _patches_needed(self, num_patches: int, max_new_tokens: int) -> int:
        """Positions of the backbone that prompt and continuation take; ValueError when its context holds fewer."""
        context, patch_size = context_of(self.config), self.config.patch_size
        needed = positions_needed(num_patches * patch_size, max_new_tokens, patch_size)
        if context is not None and needed > context:
            raise ValueError(
                f"the prompt and max_new_tokens={max_new_tokens} need {needed} patches of {patch_size} tokens, but the "
                f"model's context holds {context}: shorten the prompt or ask for at most "
                f"{room_for_new(context, num_patches * patch_size, patch_size)} new tokens."
            )
        return needed


def check_finite(hidden: Tensor) -> None:
    """Raise ValueError for hidden states of which no text can be made."""
    if not bool(hidden.isfinite().all()):
        raise ValueError("the model gives NaN or infinity: its weights are damaged, or its training diverged.")


def _mask_of_padding(input_ids: Tensor, padding: int) -> Tensor | None:
    """``[B, T]``; None where no row begins or ends with padding."""
    is_text = input_ids.ne(padding)
    has_padding = input_ids.shape[1] > 0 and not bool((is_text[:, 0] & is_text[:, -1]).all())
    return is_text.long() if has_padding else None


def _drawn_once(tokens: Tensor) -> NextChunk:
    """Chunks ``[B, K]`` that took one draw each, decoded whole."""
    ones = torch.ones(len(tokens), dtype=torch.long, device=tokens.device)
    return NextChunk(tokens, ones, ones * tokens.shape[1])


def _repeat(state: GenerationState, times: int) -> GenerationState:
    """Every row so many times."""
    state.past_key_values.batch_repeat_interleave(times)
    mask = state.patch_mask
    return GenerationState(
        state.hidden.repeat_interleave(times, dim=0),
        state.past_key_values,
        state.position.repeat_interleave(times, dim=0),
        None if mask is None else mask.repeat_interleave(times, dim=0),
    )
