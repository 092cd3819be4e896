"""Drafters: small models that propose the next tokens from the hidden states of a token model, their target.

The target has read a text up to one token, and the token after it is known. A drafter sees the target's features of the
last position that was read and the known token, and proposes up to G tokens that follow. It uses the input embeddings
and the output layer of the target, restricted to a shortlist of frequent tokens: what it proposes is verified, so a
token outside the shortlist costs speed alone.

Shapes: B rows, T positions, G drafted tokens, F features (number of feature layers times D), D hidden, M shortlist.
"""

import hashlib
import json
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from calm.compat.candidate_generator import accept_own_candidate_generators
from calm.functional.rng import Generator, pick, uniform
from calm.functional.temperature import sharpened
from calm.models.drafters.configuration import DrafterConfig


@dataclass
class Draft:
    """Proposed tokens, of one or several positions.

    Args:
        tokens: ids in the target's vocabulary, ``[B, G]``.
        probs: probabilities of the shortlist that the tokens were sampled from, given the tokens before them,
            ``[B, G, M]``; None for the most likely tokens (temperature 0).
    """

    tokens: Tensor
    probs: Tensor | None


def join(drafts: list[Draft]) -> Draft:
    """Return drafts of consecutive positions as one."""
    probs = [draft.probs for draft in drafts if draft.probs is not None]
    return Draft(torch.cat([draft.tokens for draft in drafts], dim=1), torch.cat(probs, dim=1) if probs else None)


accept_own_candidate_generators()
_VOLATILE = ("_name_or_path", "architectures", "attn_implementation", "dtype", "transformers_version", "use_cache")


def target_hash(config: Any) -> str:
    """Return a hash of the configuration of a target, without what does not change its hidden states."""
    settings = {key: value for key, value in config.get_text_config().to_dict().items() if key not in _VOLATILE}
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()[:16]


class Drafter(PreTrainedModel):
    """Base class of drafters; subclasses implement :meth:`propose` and :meth:`loss`."""

    config: DrafterConfig
    config_class = DrafterConfig
    base_model_prefix = ""
    shortlist: Tensor  # ids of the tokens that may be drafted, [M]

    def __init__(self, config: DrafterConfig):
        super().__init__(config)
        size = config.hidden_size
        self.register_buffer("shortlist", torch.zeros(config.shortlist_size, dtype=torch.long))
        self.feature_proj = nn.Linear(len(config.feature_layers) * size, size, bias=False)
        self.token_proj = nn.Linear(size, size, bias=False)
        self.blocks = nn.ModuleList(ResidualBlock(size, config.layer_norm_eps) for _ in range(config.num_mlp_layers))

    def attach(self, target: PreTrainedModel) -> "Drafter":
        """Use the embeddings and the output layer of the target.

        Raises:
            ValueError: if the target is not the one this drafter was trained for.
        """
        found = target_hash(target.config)
        if self.config.target_hash and found != self.config.target_hash:
            raise ValueError(
                f"this drafter was trained for another target (target_hash {self.config.target_hash}, this model has "
                f"{found}): load the model that it was trained for, or train a drafter for this one."
            )
        # In a tuple, so that they are not registered as parts of the drafter.
        self._tables: tuple[Tensor, Tensor] = (
            cast(Tensor, target.get_input_embeddings().weight).detach(),
            cast(Tensor, target.get_output_embeddings().weight).detach()[self.shortlist].contiguous(),
        )
        return self

    def candidate_generator(
        self, target: PreTrainedModel, generation_config: Any, input_ids: Tensor, model_kwargs: Any, tokenizer: Any
    ) -> Any:
        """Return what ``target.generate(..., assistant_model=drafter)`` of transformers calls for candidates."""
        from calm.generation.assisted import DrafterCandidates

        self.to(target.device).eval().attach(target)  # type: ignore[arg-type]
        return DrafterCandidates(self, target, generation_config, tokenizer)

    def embed(self, token_ids: Tensor) -> Tensor:
        """Return the target's embeddings of tokens, scaled to unit variance: ``[...] -> [..., D]``."""
        embeddings = F.embedding(token_ids, self._tables[0])
        return F.layer_norm(embeddings.float(), embeddings.shape[-1:], eps=self.config.layer_norm_eps)

    def logits(self, states: Tensor) -> Tensor:
        """Return the logits of the shortlist, ``[..., D] -> [..., M]``, by the target's output layer."""
        return F.linear(states, self._tables[1].to(states.dtype)).float()

    def trunk(self, features: Tensor, token_ids: Tensor) -> Tensor:
        """Return a state per position from the target's features and the token after it: ``[..., D]``."""
        features = features.to(self.feature_proj.weight.dtype)
        size = self.config.hidden_size
        parts = [F.rms_norm(part, (size,), eps=1e-6) for part in features.split(size, dim=-1)]
        states = self.feature_proj(torch.cat(parts, dim=-1)) + self.token_proj(self.embed(token_ids))
        for block in self.blocks:
            states = block(states)
        return states

    # A drafter that looks at the whole text keeps a state; the others have none.

    def new_state(self, num_rows: int) -> Any:
        """Return the state of ``num_rows`` empty texts; None if the drafter has none."""
        return None

    def extend(self, state: Any, features: Tensor, token_ids: Tensor, lengths: Tensor) -> None:
        """Read positions that the target has verified.

        Args:
            features: of the positions, ``[B, T, F]``.
            token_ids: the token after each position, ``[B, T]``.
            lengths: positions of each row that count, ``[B]``; those after them are ignored.
        """

    def propose(
        self,
        features: Tensor,
        token_ids: Tensor,
        temperature: float,
        num_tokens: int,
        generator: Generator = None,
        state: Any = None,
    ) -> Draft:
        """Propose tokens.

        Args:
            features: of the last position that the target has read, ``[B, F]``.
            token_ids: the known token after it, ``[B]``.
            temperature: at least 0; 0 proposes the most likely tokens.
            num_tokens: at most ``config.num_tokens``.
        """
        raise NotImplementedError

    def loss(self, batch: "DraftBatch", teacher_logits: Tensor, noise: Tensor) -> Tensor:
        """Return the cross-entropy against the target's probabilities, ``[B, T, G]``.

        Args:
            teacher_logits: of the target on the shortlist, ``[B, T, G, M]``.
            noise: uniform in [0, 1), ``[B, T]``.
        """
        raise NotImplementedError

    def choose(self, logits: Tensor, temperature: float, generator: Generator) -> Draft:
        """Choose a token of the shortlist for every position, from logits ``[B, n, M]``."""
        if temperature == 0:
            return Draft(self.shortlist[logits.argmax(-1)], None)
        probs = sharpened(logits, temperature)
        uniforms = uniform((*logits.shape[:2], 1), generator, logits.device, row_dim=0)
        return Draft(self.shortlist[pick(probs, uniforms)[..., 0]], probs)


@dataclass
class DraftBatch:
    """Texts as drafters train on them.

    Args:
        features: of the target, ``[B, T, F]``.
        next_ids: the token after each position, ``[B, T]``.
        future_ids: the G tokens after that, ``[B, T, G]``.
        is_target: which of them exist and count, ``[B, T, G]``.
    """

    features: Tensor
    next_ids: Tensor
    future_ids: Tensor
    is_target: Tensor


class ResidualBlock(nn.Module):
    """Pre-norm residual MLP: ``[..., D] -> [..., D]``."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.norm = nn.RMSNorm(size, eps=eps)
        self.mlp = nn.Sequential(nn.Linear(size, 2 * size), nn.SiLU(), nn.Linear(2 * size, size))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(self.norm(x))


def soft_cross_entropy(logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Return the cross-entropy against the probabilities of a teacher: ``[..., M], [..., M] -> [...]``."""
    return -(teacher_logits.softmax(-1) * logits.log_softmax(-1)).sum(-1)
