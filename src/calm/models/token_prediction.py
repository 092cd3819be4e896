"""A training aid: the hidden state also says the tokens of the next patch, each by itself.

The energy score tells the backbone little at a time about what follows from a context; cross-entropy tells it a lot.
Generation does not use this part.

Shapes: P positions, K tokens of a patch, D hidden, V vocabulary.
"""

from torch import Tensor, nn

from calm.models.linear_cross_entropy import linear_cross_entropy


class TokenPredictor(nn.Module):
    """One linear map per token of the patch, in front of the backbone's token embeddings as output layer."""

    def __init__(self, patch_size: int, hidden_size: int):
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Linear(hidden_size, patch_size * hidden_size, bias=False)

    def states(self, hidden: Tensor) -> Tensor:
        """States of the next patch's tokens, ready for the output layer: ``[..., D] -> [..., K, D]``."""
        return self.proj(hidden).unflatten(-1, (self.patch_size, -1))

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
