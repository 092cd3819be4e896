"""Token prediction: the hidden state also says the tokens of the next patch, each by itself.

A training aid first: the energy score tells the backbone little at a time about what follows from a context,
cross-entropy tells it a lot. Once trained it is a second way to the next patch, without head and autoencoder
(``sampler="token_prediction"``): multi-token prediction (Gloeckle et al. 2024, arXiv 2404.19737), with tokens that are
independent given the hidden state. It is what a head has to beat.

Shapes: P positions, K tokens of a patch, D hidden, V vocabulary.
"""

import torch
from torch import Tensor, nn

from calm.functional.noise import Generator, pick, uniform
from calm.functional.temperature import LOWEST_TEMPERATURE
from calm.functional.tiles import rows_at_once
from calm.models.linear_cross_entropy import linear_cross_entropy

_TILE_ELEMENTS = 2**22  # of a (positions x tokens x vocabulary) tensor: 16 MiB in float32


class TokenPredictor(nn.Module):
    """One linear map per token of the patch, in front of the backbone's token embeddings as output layer."""

    def __init__(self, patch_size: int, hidden_size: int):
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Linear(hidden_size, patch_size * hidden_size, bias=False)

    def states(self, hidden: Tensor) -> Tensor:
        """States of the next patch's tokens, ready for the output layer: ``[..., D] -> [..., K, D]``."""
        return self.proj(hidden).unflatten(-1, (self.patch_size, -1))

    def draw(self, hidden: Tensor, embeddings: Tensor, temperature: float = 1.0, generator: Generator = None) -> Tensor:
        """The next patch, its tokens independent of each other given the hidden state: ``[P, D], [V, D] -> [P, K]``.

        Args:
            temperature: above 0; every token's probabilities to the power of 1 / temperature.
            generator: one, or a list of one per position.
        """
        luck = uniform((len(hidden), self.patch_size, 1), generator, hidden.device, row_dim=0)
        size = rows_at_once(self.patch_size * len(embeddings), hidden.device, _TILE_ELEMENTS)
        tiles = zip(hidden.split(size), luck.split(size), strict=True)
        return torch.cat([self._draw(*tile, embeddings, temperature) for tile in tiles])

    def _draw(self, hidden: Tensor, luck: Tensor, embeddings: Tensor, temperature: float) -> Tensor:
        logits = (self.states(hidden) @ embeddings.T).float()
        # However low the temperature, the likeliest token stays a number.
        logits = (logits - logits.amax(-1, keepdim=True)) / max(temperature, LOWEST_TEMPERATURE)
        return pick(logits.softmax(-1), luck)[..., 0]

    def loss(self, hidden: Tensor, token_ids: Tensor, is_target: Tensor, embeddings: Tensor) -> Tensor:
        """Mean cross-entropy per token in nats, scalar; 0 where nothing is a target.

        Args:
            hidden: ``[..., D]``.
            token_ids: of the next patch, ``[..., K]``.
            is_target: which patches count, ``[...]``.
            embeddings: ``[V, D]``.
        """
        any_target = is_target.any()
        # Without a target all count, times zero: a mean over nothing would be no number.
        labels = token_ids.clamp(min=0).masked_fill((any_target & ~is_target)[..., None], -100)
        states = self.states(hidden).flatten(0, -2)
        return linear_cross_entropy(states, embeddings, labels.flatten()) * any_target
