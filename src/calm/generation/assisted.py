"""Candidate generators for ``generate(..., assistant_model=...)`` of transformers.

Shapes: T tokens of the text so far, n positions of the last pass, G drafted tokens, F features, V vocabulary.
"""

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, PreTrainedModel
from transformers.generation import StopStringCriteria
from transformers.generation.candidate_generator import CandidateGenerator

from calm.generation.drafting import check_target
from calm.generation.samplers import find_sampler
from calm.generation.sampling_params import SamplingParams
from calm.models.context import context_of
from calm.models.drafters.base import Drafter
from calm.models.modeling_calm import CalmForCausalLM


class _Candidates(CandidateGenerator):
    """What the candidate generators have in common.

    The target is run once without candidates first: a draft follows a token that is known and not yet read.
    """

    requires_model_outputs = True
    model_kwargs_overrides: ClassVar[dict[str, Any]] = {}

    def __init__(self, target: PreTrainedModel, generation_config: GenerationConfig, num_tokens: int, tokenizer: Any):
        check_target(target)
        self.max_length = generation_config.max_length
        self.num_tokens = min(num_tokens, generation_config.num_assistant_tokens or num_tokens)
        self.is_sampling = bool(generation_config.do_sample)
        self.temperature = float(generation_config.temperature or 1.0) if self.is_sampling else 0.0
        self.vocab_size = target.config.get_text_config().vocab_size
        stop: Any = generation_config.stop_strings
        self.stop = StopStringCriteria(tokenizer, stop) if stop else None

    @torch.no_grad()
    def get_candidates(  # type: ignore[override]  # the arguments of generators with requires_model_outputs
        self,
        input_ids: Tensor,
        model_kwargs: dict[str, Any],
        model_outputs: Any,
        is_first_iteration: bool,
        n_last_matches: int,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the text with candidates after it, ``[1, T + G]``, and their logits ``[1, G, V]`` if known."""
        if is_first_iteration:
            return input_ids, None
        # The last token of a text needs no draft: the pass that verifies the others gives it as well.
        num_tokens = min(self.num_tokens, self.max_length - input_ids.shape[1] - 1)
        if num_tokens < 1:
            return input_ids, None
        tokens, logits = self._propose(input_ids, model_kwargs, model_outputs, int(n_last_matches), num_tokens)
        candidates = torch.cat([input_ids, tokens.to(input_ids.device)], dim=1)
        if self.stop is None:
            return candidates, logits if self.is_sampling else None
        return self._before_stop(candidates, input_ids.shape[1]), None

    def update_candidate_strategy(self, input_ids: Tensor, scores: Tensor, num_matches: int) -> None:
        """Do nothing: all drafts have the same length. The method is abstract in transformers 5.17."""

    def _before_stop(self, candidates: Tensor, start: int) -> Tensor:
        """Return candidates up to the first that would complete a stop string.

        transformers compares stop strings with the end of the text alone, so that the token that completes one has to
        be the last of a pass. The cut depends on the candidates; without their logits the text is made of samples of
        the target alone, whatever the candidates are.
        """
        assert self.stop is not None
        for length in range(start + 1, candidates.shape[1] + 1):
            if bool(self.stop(candidates[:, :length], None).any()):
                return candidates[:, : length - 1]
        return candidates

    def _propose(
        self, input_ids: Tensor, model_kwargs: dict[str, Any], outputs: Any, num_matches: int, num_tokens: int
    ) -> tuple[Tensor, Tensor | None]:
        raise NotImplementedError


class DrafterCandidates(_Candidates):
    """Candidates of a drafter, from the hidden states of the target."""

    model_kwargs_overrides: ClassVar[dict[str, Any]] = {"output_hidden_states": True}

    def __init__(
        self, drafter: Drafter, target: PreTrainedModel, generation_config: GenerationConfig, tokenizer: Any = None
    ):
        super().__init__(target, generation_config, drafter.config.num_tokens, tokenizer)
        self.drafter = drafter
        self.state = drafter.new_state(1)
        self.is_prompt = True

    def _propose(
        self, input_ids: Tensor, model_kwargs: dict[str, Any], outputs: Any, num_matches: int, num_tokens: int
    ) -> tuple[Tensor, Tensor | None]:
        layers = [outputs.hidden_states[index] for index in self.drafter.config.feature_layers]
        features = torch.cat(layers, dim=-1)
        if self.is_prompt:
            mask = model_kwargs.get("attention_mask")
            if mask is not None:  # padding before the prompt
                features = features[:, int((mask[0, : features.shape[1]] == 0).sum()) :]
            self.is_prompt = False
        else:
            features = features[:, : num_matches + 1]
        count = features.shape[1]
        if self.state is not None:
            lengths = torch.tensor([count], device=features.device)
            self.drafter.extend(self.state, features, input_ids[:, -count:], lengths)
        draft = self.drafter.propose(features[:, -1], input_ids[:, -1], self.temperature, num_tokens, None, self.state)
        if draft.probs is None:
            return draft.tokens, None
        logits = draft.probs.new_full((*draft.tokens.shape, self.vocab_size), float("-inf"))
        return draft.tokens, logits.index_copy_(-1, self.drafter.shortlist, draft.probs.log())


class CalmCandidates(_Candidates):
    """Candidates of a CALM: the most likely rest of the patch that the text has reached, then whole patches.

    The backbone reads every patch of the text once. The tokens of the present patch that are known already are given
    to the head, so that a draft can begin anywhere in a patch.
    """

    def __init__(
        self,
        calm: CalmForCausalLM,
        target: PreTrainedModel,
        generation_config: GenerationConfig,
        input_ids: Tensor,
        tokenizer: Any = None,
    ):
        self.patch_size = calm.config.patch_size
        super().__init__(target, generation_config, self.patch_size, tokenizer)
        samplers = [find_sampler(name) for name in calm.samplers]
        if calm.config.vocab_size != self.vocab_size:
            raise ValueError(
                f"the CALM has {calm.config.vocab_size} tokens and the model {self.vocab_size}: assistant_model must "
                "be trained with the tokenizer of the model."
            )
        self.sampler = next((sampler for sampler in samplers if sampler.has_probabilities), None)
        if self.sampler is None:
            raise ValueError(
                "a CALM drafts with token probabilities, and this one has none: as assistant_model, use one with a "
                "categorical flow head or multi-token prediction."
            )
        self.calm = calm
        self.params = SamplingParams(temperature=0.0, sampler=self.sampler.name).with_defaults()
        self.context = context_of(calm.config)
        self.prompt_length = input_ids.shape[1]
        self.cache = DynamicCache(config=calm.config.backbone_config)
        self.num_read = 0  # patches
        self.hidden: Tensor  # of the last patch that was read, [1, D]
        self.front: Tensor | None = None  # separators before the prompt, [1, 0 to K - 1]

    def _propose(
        self, input_ids: Tensor, model_kwargs: dict[str, Any], outputs: Any, num_matches: int, num_tokens: int
    ) -> tuple[Tensor, Tensor | None]:
        if self.front is None:
            mask = model_kwargs.get("attention_mask")
            self.start = 0 if mask is None else int((mask[0, : self.prompt_length] == 0).sum())
            aligned, _ = self.calm.align_prompt(input_ids[:, self.start : self.prompt_length].cpu())
            self.front = aligned[:, : aligned.shape[1] - self.prompt_length + self.start].to(self.calm.device)
        text = torch.cat([self.front, input_ids[:, self.start :].to(self.calm.device)], dim=1)
        num_whole, num_known = divmod(text.shape[1], self.patch_size)
        num_patches = -(-(num_known + num_tokens) // self.patch_size)  # to draft
        if self.context is not None and num_whole + num_patches - 1 > self.context:
            return input_ids[:, :0], None  # the text is longer than the CALM can read
        if num_whole > self.num_read:
            self.hidden = self._read(text[:, self.num_read * self.patch_size : num_whole * self.patch_size])
            self.num_read = num_whole
        known = text[:, num_whole * self.patch_size :]
        patches = [self._complete(self.hidden, known)]
        while len(patches) < num_patches:
            patches.append(self._complete(self._read(patches[-1]), known[:, :0]))
        if num_patches > 1:
            self.cache.crop(1 - num_patches)  # what was drafted is not verified
        drafted = torch.cat(patches, dim=1)
        return drafted[:, num_known : num_known + num_tokens], None

    def _read(self, ids: Tensor) -> Tensor:
        """Feed patches to the backbone, ``[1, n * K]``; return the hidden state of the last one, ``[1, D]``."""
        output = self.calm(ids, past_key_values=self.cache, use_cache=True)
        return output.last_hidden_state[:, -1]

    def _complete(self, hidden: Tensor, known: Tensor) -> Tensor:
        """Return the most likely patch that begins with the known tokens: ``[1, D], [1, 0 to K - 1] -> [1, K]``."""
        assert self.sampler is not None
        if known.shape[1] == 0:
            return self.sampler.sample(self.calm, hidden, self.params, None).tokens
        tokens = F.pad(known, (0, self.patch_size - known.shape[1]))
        for position in range(known.shape[1], self.patch_size):
            best = self.sampler.score(self.calm, hidden, tokens, num_top=1)[0].top_ids
            tokens[:, position] = best[:, position, 0]
        return tokens
