"""Token prediction: the hidden state also says the tokens of the next patch, as a distribution.

A training aid first: the energy score tells the backbone little at a time about what follows from a context,
cross-entropy tells it a lot. Once trained it is a second way to the next patch, without head and autoencoder
(``sampler="mtp"``), and what a head has to beat. Two kinds:

- *independent*: every token by itself, given the hidden state; multi-token prediction (Gloeckle et al. 2024, arXiv
  2404.19737).
- *autoregressive*: every token also from those before it in its patch, through a small network each; what a patch costs
  beyond that is still one step of the backbone (MegaByte, Yu et al. 2023, arXiv 2305.07185).

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
    """States of the next patch's tokens, in front of the backbone's token embeddings as output layer."""

    def __init__(self, patch_size: int, hidden_size: int, autoregressive: bool = False):
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Linear(hidden_size, patch_size * hidden_size, bias=False)
        autoregressive = autoregressive and patch_size > 1
        self.norm = nn.LayerNorm(hidden_size) if autoregressive else None
        # Of the second token and those behind it: what the tokens before them add.
        self.mixers = nn.ModuleList(
            nn.Sequential(
                nn.Linear((1 + before) * hidden_size, 2 * hidden_size),
                nn.SiLU(),
                nn.Linear(2 * hidden_size, hidden_size),
            )
            for before in (range(1, patch_size) if autoregressive else ())
        )

    def loss(self, hidden: Tensor, token_ids: Tensor, is_target: Tensor, embeddings: Tensor) -> Tensor:
        """Mean cross-entropy per token in nats, scalar; 0 where nothing is a target.

        Args:
            hidden: ``[..., D]``.
            token_ids: of the next patch, ``[..., K]``.
            is_target: which patches count, ``[...]``.
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
        """The next patch of every hidden state: ``[P, D], [V, D] -> [P, K]``.

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
                state = state + self._of_before(self._known(hidden, before), position)
            tokens.append(pick(sharpened(state @ embeddings.T, temperature, top_p), uniforms[:, position])[:, 0])
        return torch.stack(tokens, dim=-1)

    def _states(self, hidden: Tensor, token_ids: Tensor, embeddings: Tensor) -> Tensor:
        """States of all tokens of known patches: ``[..., D], [..., K] -> [..., K, D]``."""
        states = self.proj(hidden).unflatten(-1, (self.patch_size, -1))
        if self.norm is None:
            return states
        known = self._known(hidden, nn.functional.embedding(token_ids, embeddings))
        more = [self._of_before(known, position) for position in range(1, self.patch_size)]
        return states + torch.stack([torch.zeros_like(hidden), *more], dim=-2)

    def _known(self, hidden: Tensor, embedded: Tensor) -> Tensor:
        """Hidden state and embedded tokens of its patch, normalised: ``[..., D], [..., n, D] -> [..., 1 + n, D]``."""
        assert self.norm is not None
        return self.norm(torch.cat([hidden.unsqueeze(-2), embedded], dim=-2))

    def _of_before(self, known: Tensor, position: int) -> Tensor:
        """What is added to a token's state for those before it: ``[..., 1 + n, D] -> [..., D]``."""
        return self.mixers[position - 1](known[..., : 1 + position, :].flatten(-2))
