"""The MTP head: multi-token prediction of the next patch from the hidden state.

Its cross-entropy is an auxiliary loss that trains the backbone with less variance than the energy score. A trained MTP
head is also a sampler of its own, without head and autoencoder (``sampler="mtp"``). If its score is far above the
head's, the head is the bottleneck; if both are low, the backbone is. Two types:

- *independent*: every token by itself, given the hidden state; multi-token prediction (Gloeckle et al. 2024, arXiv
  2404.19737).
- *autoregressive*: every token also from those before it in its patch, through a small network per token; a patch
  still takes one step of the backbone (MegaByte, Yu et al. 2023, arXiv 2305.07185).

Shapes: P positions, K tokens of a patch, D hidden, V vocabulary.
"""

import torch
from torch import Tensor, nn

from calm.functional.rng import Generator, pick, uniform
from calm.functional.temperature import largest, sharpened
from calm.functional.tiles import rows_at_once
from calm.models.linear_cross_entropy import linear_cross_entropy

_TILE_ELEMENTS = 2**20  # of a (positions x vocabulary) tensor: 4 MiB in float32


class MTPHead(nn.Module):
    """Compute a state per token of the next patch; the output layer is the token embedding of the backbone."""

    def __init__(self, patch_size: int, hidden_size: int, autoregressive: bool = False):
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Linear(hidden_size, patch_size * hidden_size, bias=False)
        autoregressive = autoregressive and patch_size > 1
        self.norm = nn.LayerNorm(hidden_size) if autoregressive else None
        # One for the second and every later token: what the tokens before it add to its state.
        self.mixers = nn.ModuleList(
            nn.Sequential(
                nn.Linear((1 + before) * hidden_size, 2 * hidden_size),
                nn.SiLU(),
                nn.Linear(2 * hidden_size, hidden_size),
            )
            for before in (range(1, patch_size) if autoregressive else ())
        )

    def loss(self, hidden: Tensor, token_ids: Tensor, is_target: Tensor, embeddings: Tensor) -> Tensor:
        """Compute the mean cross-entropy per token in nats, scalar; 0 without a target.

        Args:
            hidden: ``[..., D]``.
            token_ids: tokens of the next patch, ``[..., K]``.
            is_target: mask of the patches that count, ``[...]``.
            embeddings: ``[V, D]``.
        """
        labels = token_ids.masked_fill(~is_target[..., None], -100)
        states = self._states(hidden, token_ids.clamp(min=0), embeddings)
        return linear_cross_entropy(states.flatten(0, -2), embeddings, labels.flatten())

    def log_probabilities(
        self, hidden: Tensor, token_ids: Tensor, embeddings: Tensor, num_top: int = 0
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the log-probabilities in nats of the tokens of given next patches, each given those before it.

        Args:
            hidden, token_ids, embeddings: ``[P, D], [P, K], [V, D]``.
            num_top: n, number of the most likely tokens at every position that are also returned.

        Returns:
            the log-probabilities ``[P, K]`` in float32, a mask ``[P, K]`` of the tokens that are the most likely, and
            log-probabilities and ids of the n most likely tokens in descending order, ``[P, K, n]`` each.
        """
        states = self._states(hidden, token_ids, embeddings).flatten(0, 1)
        size = rows_at_once(len(embeddings), hidden.device, _TILE_ELEMENTS)
        found = []
        for state, token in zip(states.split(size), token_ids.flatten().split(size), strict=True):
            log_probs = (state @ embeddings.T).float().log_softmax(-1)
            of_tokens = log_probs.gather(-1, token[:, None])[:, 0]
            top, top_ids = largest(log_probs.softmax(-1), num_top)
            found.append((of_tokens, log_probs.argmax(-1) == token, top.log(), top_ids))
        parts = [torch.cat(tiles).unflatten(0, token_ids.shape) for tiles in zip(*found, strict=True)]
        return parts[0], parts[1], parts[2], parts[3]

    def draw(
        self,
        hidden: Tensor,
        embeddings: Tensor,
        temperature: float = 1.0,
        generator: Generator = None,
        top_p: float = 1.0,
    ) -> Tensor:
        """Sample the next patch of every hidden state: ``[P, D], [V, D] -> [P, K]``.

        Args:
            temperature: at least 0; every token's probabilities to the power of 1 / temperature.
            generator: one, or a list of one per position.
            top_p: as :func:`~calm.functional.temperature.sharpened` has it, for every token.
        """
        uniforms = uniform((len(hidden), self.patch_size, 1), generator, hidden.device, row_dim=0)
        size = rows_at_once(len(embeddings), hidden.device, _TILE_ELEMENTS)
        tiles = zip(hidden.split(size), uniforms.split(size), strict=True)
        return torch.cat([self._draw(*tile, embeddings, temperature, top_p) for tile in tiles])

    def _draw(self, hidden: Tensor, uniforms: Tensor, embeddings: Tensor, temperature: float, top_p: float) -> Tensor:
        states = self.proj(hidden).unflatten(-1, (self.patch_size, -1))
        tokens: list[Tensor] = []
        for position in range(self.patch_size):
            state = states[:, position]
            if self.norm is not None and position:
                before = nn.functional.embedding(torch.stack(tokens, dim=-1), embeddings)
                state = state + self._of_before(self._normalised(hidden, before), position)
            tokens.append(pick(sharpened(state @ embeddings.T, temperature, top_p), uniforms[:, position])[:, 0])
        return torch.stack(tokens, dim=-1)

    def _states(self, hidden: Tensor, token_ids: Tensor, embeddings: Tensor) -> Tensor:
        """Return the states of all tokens of given patches: ``[..., D], [..., K] -> [..., K, D]``."""
        states = self.proj(hidden).unflatten(-1, (self.patch_size, -1))
        if self.norm is None:
            return states
        embedded = self._normalised(hidden, nn.functional.embedding(token_ids, embeddings))
        more = [self._of_before(embedded, position) for position in range(1, self.patch_size)]
        return states + torch.stack([torch.zeros_like(hidden), *more], dim=-2)

    def _normalised(self, hidden: Tensor, embedded: Tensor) -> Tensor:
        """Normalise hidden state and embedded tokens: ``[..., D], [..., n, D] -> [..., 1 + n, D]``."""
        assert self.norm is not None
        return self.norm(torch.cat([hidden.unsqueeze(-2), embedded], dim=-2))

    def _of_before(self, embedded: Tensor, position: int) -> Tensor:
        """Return what the tokens before a token add to its state: ``[..., 1 + n, D] -> [..., D]``."""
        return self.mixers[position - 1](embedded[..., : 1 + position, :].flatten(-2))
