"""Generation chunk by chunk: one step of the backbone, one latent, K tokens.

``prefill`` reads the prompt, ``next_chunk`` draws K tokens from the last hidden state, ``extend`` feeds them back;
``generate`` is the loop around them, with the signature transformers users know.

Shapes: B batch, T tokens, K tokens of a patch, L patches, D hidden, N candidates, Z latent.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin
from transformers.cache_utils import Cache
from transformers.generation import StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from calm.functional.temperature import batch_temperature_sample, check_temperature, exact_temperature_sample

SAMPLERS = ("batch", "exact")
# What a model's generation_config.json says beside its end-of-text and padding tokens.
GENERATION_DEFAULTS = {
    "do_sample": True,
    "temperature": 1.0,
    "sampler": "batch",
    "num_candidates": 200,
    "max_new_tokens": 128,
}


@dataclass
class GenerationState:
    """What a step hands to the next: the condition of the next patch and the cache behind it."""

    hidden: Tensor  # [B, D]
    past_key_values: Cache
    patch_mask: Tensor  # [B, L], 0 for padding in front


class CalmGenerationMixin:
    """``generate`` and its parts, for :class:`~calm.models.modeling_calm.CalmForCausalLM`."""

    # What the model brings.
    generation_config: GenerationConfig
    config: Any
    head: Any
    autoencoder: Any
    get_input_embeddings: Callable[[], Any]
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
        generator: torch.Generator | None = None,
        streamer: BaseStreamer | None = None,
        stopping_criteria: StoppingCriteriaList | None = None,
        generation_config: GenerationConfig | None = None,
        **kwargs,
    ) -> Tensor:
        """Continue prompts of any length.

        Args:
            input_ids: prompts ``[B, T]``, left-padded; none or an empty prompt starts a new document.
            attention_mask: ``[B, T]``, 0 for the padding on the left.
            max_new_tokens: tokens to add at most; need not be a multiple of K.
            temperature: in (0, 1].
            sampler: ``"batch"`` chooses among ``num_candidates`` draws (fast, approximate); ``"exact"`` draws until
                enough of them agree (exact law, its cost grows fast as the temperature falls).
            num_candidates: N of the batch sampler, and of the exact sampler's fallback.
            generator: source of all randomness; on one device, one seed gives one text.
            streamer: receives the prompt, then every chunk (batch size 1).
            stopping_criteria: called with all tokens so far after every chunk.
            generation_config: replaces the model's; the arguments above come before either.

        Returns:
            ``[B, T + new]``: prompt and continuation. Behind its end-of-text token a row holds padding.
        """
        if kwargs:
            raise ValueError(
                f"generate() does not take {', '.join(map(repr, kwargs))}: a model without token probabilities has no "
                "use for top_p, beams or penalties. It takes max_new_tokens, temperature, sampler, num_candidates, "
                "generator, streamer and stopping_criteria."
            )
        defaults = generation_config or self.generation_config

        def setting(given: Any, name: str) -> Any:
            saved = getattr(defaults, name, None)
            return given if given is not None else saved if saved is not None else GENERATION_DEFAULTS[name]

        temperature = setting(temperature, "temperature")
        sampler = setting(sampler, "sampler")
        num_candidates = setting(num_candidates, "num_candidates")
        max_new_tokens = setting(max_new_tokens, "max_new_tokens")
        _check_sampling(temperature, sampler, num_candidates, max_new_tokens)
        if input_ids is None:
            input_ids = torch.empty((1, 0), dtype=torch.long, device=self.get_input_embeddings().weight.device)
        end_ids = _end_ids(defaults.eos_token_id, input_ids.device)
        pad_id = defaults.pad_token_id if defaults.pad_token_id is not None else int(end_ids[0]) if len(end_ids) else 0
        aligned_ids, patch_mask = self.align_prompt(input_ids, attention_mask)
        self._check_context(patch_mask.shape[1], max_new_tokens)

        if streamer is not None:
            if len(input_ids) > 1:
                raise ValueError(f"a streamer takes one sequence, got a batch of {len(input_ids)}.")
            streamer.put(input_ids.cpu())
        tokens = input_ids
        finished = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
        state = self.prefill(aligned_ids, patch_mask)
        remaining = max_new_tokens
        while remaining > 0:
            chunk = self.next_chunk(state.hidden, temperature, sampler, num_candidates, generator)
            new = chunk[:, :remaining]
            is_end = torch.isin(new, end_ids)
            # Behind the end-of-text token, also inside its own chunk, a row holds padding.
            is_text = ~(finished[:, None] | (is_end.cumsum(1) - is_end.long()).bool())
            tokens = torch.cat([tokens, new.masked_fill(~is_text, pad_id)], dim=1)
            finished = finished | is_end.any(1)
            remaining -= new.shape[1]
            if streamer is not None:
                streamer.put(new[is_text].cpu())
            if stopping_criteria is not None:
                finished = finished | stopping_criteria(tokens, None)
            if remaining <= 0 or bool(finished.all()):
                break
            state = self.extend(state, chunk)
        if streamer is not None:
            streamer.end()
        return tokens

    def align_prompt(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Make prompts end on a patch boundary: ``[B, T] -> [B, L * K], patch mask [B, L]``.

        Left-over places in front of a prompt are filled with the end-of-text token: in packed training text documents
        follow it at every offset, so the model has seen this.
        """
        batch_size, length = input_ids.shape
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        if attention_mask.shape != input_ids.shape:
            raise ValueError(
                f"attention_mask must have the shape of input_ids, {tuple(input_ids.shape)}, got "
                f"{tuple(attention_mask.shape)}."
            )
        if length and (attention_mask.diff(dim=1) < 0).any():
            raise ValueError(
                "attention_mask must be 0 for padding on the left and 1 from the first to the last token of the "
                'prompt; tokenise with padding_side="left".'
            )
        vocab_size = self.config.vocab_size
        if length and not (int(input_ids.min()) >= 0 and int(input_ids.max()) < vocab_size):
            raise ValueError(
                f"input_ids must lie in 0 to {vocab_size - 1} (the model's vocabulary), got "
                f"{int(input_ids.min())} to {int(input_ids.max())}: is it this model's tokenizer?"
            )
        eos = self.config.eos_token_id
        separator = (eos if isinstance(eos, int) else eos[0]) if eos is not None else 0
        patch_size = self.config.patch_size
        fill = -length % patch_size if length else patch_size
        real = torch.cat([attention_mask.new_zeros(batch_size, fill), attention_mask], dim=1).bool()
        front = input_ids.new_full((batch_size, fill), separator)
        aligned = torch.cat([front, input_ids], dim=1).masked_fill(~real, separator)
        patch_mask = real.unflatten(1, (-1, patch_size)).any(-1)
        patch_mask[:, -1] = True  # an empty prompt is one patch of separators
        return aligned, patch_mask.long()

    def prefill(self, aligned_ids: Tensor, patch_mask: Tensor) -> GenerationState:
        """Read whole patches, as :meth:`align_prompt` gives them: ``[B, L * K], [B, L]``."""
        outputs = self(
            aligned_ids,
            attention_mask=patch_mask,
            position_ids=(patch_mask.cumsum(1) - 1).clamp(min=0),
            use_cache=True,
        )
        return GenerationState(outputs.last_hidden_state[:, -1], outputs.past_key_values, patch_mask)

    def extend(self, state: GenerationState, chunk: Tensor) -> GenerationState:
        """Feed a chunk ``[B, K]`` back: one step of the backbone."""
        patch_mask = torch.cat([state.patch_mask, state.patch_mask.new_ones(len(chunk), 1)], dim=1)
        outputs = self(
            chunk,
            attention_mask=patch_mask,
            position_ids=patch_mask.sum(1, keepdim=True) - 1,
            past_key_values=state.past_key_values,
            use_cache=True,
        )
        return GenerationState(outputs.last_hidden_state[:, -1], outputs.past_key_values, patch_mask)

    def next_chunk(
        self,
        hidden: Tensor,
        temperature: float = 1.0,
        sampler: str = "batch",
        num_candidates: int = 200,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Draw the K tokens that follow: ``[B, D] -> [B, K]``."""
        if check_temperature(temperature) == 1:
            return self.draw_chunks(hidden, 1, generator)[:, 0]
        if sampler == "exact":
            chunk, accepted, _ = exact_temperature_sample(
                lambda rows, count: self.draw_chunks(hidden[rows], count, generator),
                len(hidden),
                temperature,
                generator,
                device=hidden.device,
            )
            if accepted.all():
                return chunk
            warnings.warn(
                f"the draws of {int((~accepted).sum())} chunk(s) agree too rarely for exact sampling at temperature "
                f"{temperature}; the batch sampler took over there.",
                stacklevel=2,
            )
            chunk[~accepted] = self.next_chunk(hidden[~accepted], temperature, "batch", num_candidates, generator)
            return chunk
        candidates = self.draw_chunks(hidden, num_candidates, generator)
        return batch_temperature_sample(candidates, temperature, generator)

    def draw_chunks(self, hidden: Tensor, count: int, generator: torch.Generator | None = None) -> Tensor:
        """Independent draws of the next chunk at temperature 1: ``[B, D] -> [B, count, K]``."""
        latents = self.head.sample(hidden, generator=generator, num_samples=count)
        return self.autoencoder.decode_tokens(latents).movedim(0, 1)

    def _check_context(self, num_patches: int, max_new_tokens: int) -> None:
        limit = getattr(self.config.backbone_config, "max_position_embeddings", None)
        patch_size = self.config.patch_size
        needed = num_patches + -(-max_new_tokens // patch_size) - 1
        if limit is not None and needed > limit:
            raise ValueError(
                f"the prompt and max_new_tokens={max_new_tokens} need {needed} patches of {patch_size} tokens, but the "
                f"model's context holds {limit}: shorten the prompt or ask for at most "
                f"{max(0, (limit - num_patches + 1) * patch_size)} new tokens."
            )


def _check_sampling(temperature: float, sampler: str, num_candidates: int, max_new_tokens: int) -> None:
    exponent = check_temperature(temperature)
    if sampler not in SAMPLERS:
        raise ValueError(f"sampler must be one of {', '.join(SAMPLERS)}, got {sampler!r}.")
    if num_candidates < exponent:
        raise ValueError(
            f"num_candidates must be at least 1/temperature = {exponent:g}, got {num_candidates}: so many draws have "
            "to agree."
        )
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}.")


def _end_ids(eos_token_id: int | list[int] | None, device: torch.device) -> Tensor:
    ids = [] if eos_token_id is None else eos_token_id if isinstance(eos_token_id, list) else [eos_token_id]
    return torch.tensor(ids, dtype=torch.long, device=device)
