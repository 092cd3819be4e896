"""Continuous batching of a token model with a drafter: a step verifies a draft of every running sequence.

Every sequence accepts its own number of tokens. A slot of the cache has positions of its own, so rejected tokens are
overwritten by the next step. All drafts have the same length, whatever runs beside them, and every sequence has random
numbers of its own: a text is the one that :func:`~calm.generation.drafting.generate_with_drafter` gives it alone.

Shapes: n running sequences, G drafted tokens, D hidden, F features, V vocabulary.
"""

import logging
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from calm.functional.rng import uniform
from calm.functional.speculative import Verified, verify_chain
from calm.functional.temperature import sharpened
from calm.functional.tiles import is_out_of_memory
from calm.generation.sampling_params import SamplingParams
from calm.models.drafters.base import Drafter
from calm.serving.engine import Engine
from calm.serving.jobs import Delta, Job, TokenLogprob
from calm.serving.running import Running

log = logging.getLogger(__name__)


@dataclass
class _Drafted:
    """What a drafter needs of a sequence.

    Args:
        token: the last known token, which the model has not read; None until the first is sampled.
        state: of the drafter, for this sequence; None for drafters without one.
        features: of the prompt, ``[T, F]``, until the state has read them.
    """

    token: int | None
    state: Any
    features: Tensor | None


@dataclass
class _Round:
    """Verified drafts of all sequences.

    Args:
        tokens: drafted tokens, ``[n, G + 1]``, with the token after the accepted ones in its place.
        num_accepted: drafted tokens that are accepted, for every sequence.
        hidden, features: of the model at all positions, ``[n, G + 1, D]`` and ``[n, G + 1, F]``.
    """

    tokens: Tensor
    num_accepted: list[int]
    hidden: Tensor
    features: Tensor


class DraftedEngine(Engine):
    """Run the jobs of a token model with a drafter that is attached to it; other arguments as :class:`Engine`."""

    def __init__(self, drafter: Drafter, *args: Any, **kwargs: Any):
        self.drafter = drafter
        self.num_tokens = self.num_spare = drafter.config.num_tokens
        self._prompt_features: list[Tensor] = []  # of prompts that have no slot yet
        super().__init__(*args, **kwargs)

    def _prefill(self, prompts: list[list[int]]) -> tuple[Tensor, Cache, list[int]]:
        """Read prompts; the conditions are the hidden state and the features of the last token, ``[n, D + F]``."""
        longest = max(map(len, prompts))
        ids = torch.tensor([ids + [0] * (longest - len(ids)) for ids in prompts], device=self.runner.device)
        lengths = [len(ids) for ids in prompts]
        outputs = self.runner.reader(ids, use_cache=True, output_hidden_states=True)
        states = torch.cat([outputs.last_hidden_state, self._features(outputs)], dim=-1)
        width = outputs.last_hidden_state.shape[-1]
        self._prompt_features = [row[:length, width:] for row, length in zip(states, lengths, strict=True)]
        rows, last = torch.arange(len(prompts)), torch.tensor(lengths) - 1
        return states[rows, last], outputs.past_key_values, lengths

    def _start(self, job: Job, length: int) -> Running:
        running = super()._start(job, length)
        state, features = self.drafter.new_state(1), self._prompt_features.pop(0)
        running.draft = _Drafted(None, state, None if state is None else features.clone())
        return running

    def _step(self) -> None:
        self._sample_first_tokens()
        if not self._running:
            return
        self.telemetry.batch.observe(len(self._running))
        result = self._verify_drafts()
        rows, last = torch.arange(len(self._running)), torch.tensor(result.num_accepted)
        self._conditions = torch.cat([result.hidden[rows, last], result.features[rows, last]], dim=-1)
        tokens = [row[: count + 1] for row, count in zip(result.tokens.tolist(), result.num_accepted, strict=True)]
        ended = []
        for slot, (running, new) in enumerate(zip(self._running, tokens, strict=True)):
            self.telemetry.verified(self.num_tokens, len(new) - 1)
            ended.append(self._take(running, [*new, 1, len(new)], self._logprobs(running, result.hidden[slot], new)))
            if not ended[-1]:
                self._extend_draft(running, result.features[slot, : len(new)], new)
        self._end(ended)

    def _sample_first_tokens(self) -> None:
        """Sample the first token of sequences that have just joined."""
        ended = [False] * len(self._running)
        width = self.runner.backbone_config.hidden_size
        for slot, running in enumerate(self._running):
            drafted = running.draft
            if drafted.token is not None:
                continue
            hidden = self._conditions[slot, :width]
            token = int(self.runner.sample(hidden[None], running.job.step_params, [running.generator]).tokens)
            ended[slot] = self._take(running, [token, 1, 1], self._logprobs(running, hidden[None], [token]))
            drafted.token = token
            if drafted.features is not None and not ended[slot]:
                prompt = self.runner.whole_patches(running.job.prompt_ids)
                next_ids = torch.tensor([[*prompt[1:], token]], device=hidden.device)
                lengths = torch.tensor([len(prompt)], device=hidden.device)
                self.drafter.extend(drafted.state, drafted.features[None], next_ids, lengths)
                drafted.features = None
        self._end(ended)

    def _extend_draft(self, running: Running, features: Tensor, new: list[int]) -> None:
        """Go to the position after new tokens of a sequence that continues."""
        drafted = running.draft
        running.position += len(new)
        drafted.token = new[-1]
        if drafted.state is not None:
            ids = torch.tensor([new], device=features.device)
            self.drafter.extend(drafted.state, features[None], ids, torch.tensor([len(new)], device=features.device))

    def _verify_drafts(self) -> _Round:
        """Draft and verify for all sequences; when memory does not suffice, end the newest ones until it does."""
        while True:
            states = [running.generator.get_state() for running in self._running]
            try:
                return self._round()
            except Exception as error:
                count = len(self._running)
                if count == 1 or not is_out_of_memory(error):
                    raise
                log.error("no memory for a step of %d sequences: the newest one ends", count)
                for running, state in zip(self._running, states, strict=True):
                    running.generator.set_state(state)
                newest = max(range(count), key=lambda slot: self._running[slot].job.arrived)
                self._finish(self._running[newest].job, Delta("", 0, finish_reason="error"))
                self._free(newest)

    def _round(self) -> _Round:
        groups = self._groups()
        count, device = len(self._running), self.runner.device
        known = torch.tensor([running.draft.token for running in self._running], device=device)
        drafts = torch.zeros(count, self.num_tokens, dtype=torch.long, device=device)
        probs: list[Tensor | None] = []
        for params, slots in groups:
            draft = self._propose(params, slots, known)
            drafts[slots] = draft.tokens
            probs.append(draft.probs)
        hidden, features = self._read_drafts(torch.cat([known[:, None], drafts], dim=1))
        tokens = torch.cat([drafts, drafts[:, :1]], dim=1)
        accepted = torch.zeros(count, dtype=torch.long, device=device)
        for (params, slots), draft_probs in zip(groups, probs, strict=True):
            verified = self._verify(params, slots, hidden[slots], drafts[slots], draft_probs)
            accepted[slots] = verified.num_accepted
            tokens[torch.tensor(slots, device=device), verified.num_accepted] = verified.next_token
        return _Round(tokens, accepted.tolist(), hidden, features)

    def _groups(self) -> list[tuple[SamplingParams, list[int]]]:
        """Return the slots that are drafted together: with the same parameters, or one if the drafter has a state."""
        groups: dict[Any, tuple[SamplingParams, list[int]]] = {}
        for slot, running in enumerate(self._running):
            params = running.job.step_params
            key = params if running.draft.state is None else slot
            groups.setdefault(key, (params, []))[1].append(slot)
        return list(groups.values())

    def _propose(self, params: SamplingParams, slots: list[int], known: Tensor) -> Any:
        assert params.temperature is not None
        features = self._conditions[slots, self.runner.backbone_config.hidden_size :]
        rows = [self._running[slot] for slot in slots]
        state = rows[0].draft.state
        generators = [row.generator for row in rows]
        return self.drafter.propose(features, known[slots], params.temperature, self.num_tokens, generators, state)

    def _read_drafts(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Read the known token and the draft of every sequence; return hidden states and features."""
        starts = torch.tensor([running.position for running in self._running], device=ids.device)
        positions = starts[:, None] + torch.arange(ids.shape[1], device=ids.device)
        mask = self.cache.next_step(positions, max(row.position for row in self._running) + ids.shape[1])
        # Drafted tokens after the context are never accepted: a job ends before.
        last = self.cache.num_positions - 1
        outputs = self.runner.reader(
            ids, attention_mask=mask, position_ids=positions.clamp(max=last), past_key_values=self.cache,
            use_cache=True, output_hidden_states=True,
        )  # fmt: skip
        return outputs.last_hidden_state, self._features(outputs)

    def _verify(
        self, params: SamplingParams, slots: list[int], hidden: Tensor, drafts: Tensor, draft_probs: Tensor | None
    ) -> Verified:
        assert params.temperature is not None
        assert params.top_p is not None
        target_probs = sharpened(self.runner.model.get_output_embeddings()(hidden), params.temperature, params.top_p)
        if draft_probs is not None:
            of_vocabulary = draft_probs.new_zeros(*drafts.shape, target_probs.shape[-1])
            draft_probs = of_vocabulary.index_copy_(-1, self.drafter.shortlist, draft_probs)
        generators = [self._running[slot].generator for slot in slots]
        uniforms = uniform((len(slots), self.num_tokens + 1), generators, hidden.device, row_dim=0)
        return verify_chain(target_probs, drafts, draft_probs, uniforms)

    def _features(self, outputs: Any) -> Tensor:
        return torch.cat([outputs.hidden_states[layer] for layer in self.drafter.config.feature_layers], dim=-1)

    def _logprobs(self, running: Running, hidden: Tensor, tokens: list[int]) -> list[TokenLogprob] | None:
        """Return the model's own log-probabilities of new tokens, if the request asks for them."""
        num_top = running.job.params.logprobs
        if num_top is None:
            return None
        ids = torch.tensor(tokens, device=hidden.device)[:, None]
        found, _ = self.runner.log_probs(hidden[: len(tokens)], ids, num_top=num_top)
        return [logprob for row in TokenLogprob.lists(found, ids) for logprob in row]

    def _end(self, ended: list[bool]) -> None:
        for slot in reversed(range(len(ended))):
            if ended[slot]:
                self._free(slot)
