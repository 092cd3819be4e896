"""A training aid: the Brier score of the tokens that a head's draws decode to.

The energy score weighs draws by their distance to the true latent, and two latents that decode to the same token or to
another one may be equally far from it. This looks at the draws through the decoder instead: the tokens of a patch are
drawn from the mixture of what the decoder says of N latents, and the Brier scores of its n-grams are a proper rule for
that mixture, with a gradient. Evaluation scores the same n-grams (BrierLM), from tokens alone.

Shapes: N draws of the head, P positions, K tokens of a patch, E decoder states, V vocabulary.
"""

import torch
from torch import Tensor

from calm.functional.brier import NGRAM
from calm.functional.tiles import rows_at_once

_TILE_ELEMENTS = 2**20  # of a (positions x tokens x draws x vocabulary) tensor: 4 MiB in float32


def decoded_brier(states: Tensor, embeddings: Tensor, text: Tensor) -> Tensor:
    """Mean of Brier-1 to Brier-n of the first n = min(K, 4) tokens, ``[P]``; 1 at best.

    The collisions are those of different draws, so that the score is without bias for the mixture of infinitely many.
    It has a gradient for the states alone, and keeps nothing else for it: no probability outlives its tile.

    Args:
        states: of the decoder for every draw, N >= 2, ``[N, P, K, E]``.
        embeddings: its output layer, ``[V, E]``.
        text: token ids of the next patch ``[P, K]``.
    """
    longest = min(states.shape[2], NGRAM)
    states, text = states[:, :, :longest].permute(1, 2, 0, 3), text[:, :longest]
    # The products with the vocabulary have the precision of the rest of the model; probabilities are float32.
    device = states.device.type
    embeddings = embeddings.to(torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else states.dtype)
    size = rows_at_once(longest * states.shape[2] * len(embeddings), states.device, _TILE_ELEMENTS)
    tiles = zip(states.split(size), text.split(size), strict=True)
    scores: list[Tensor] = [_DecodedBrier.apply(tile, embeddings, tokens) for tile, tokens in tiles]
    return torch.cat(scores)


class _DecodedBrier(torch.autograd.Function):
    """``[P, K, N, E], [V, E], [P, K] -> [P]``."""

    @staticmethod
    def forward(ctx, states: Tensor, embeddings: Tensor, text: Tensor) -> Tensor:
        with torch.autocast(states.device.type, enabled=False):
            return _DecodedBrier._forward(ctx, states, embeddings, text)

    @staticmethod
    def _forward(ctx, states: Tensor, embeddings: Tensor, text: Tensor) -> Tensor:
        num_tokens, num_draws = states.shape[1:3]
        probs = (states.to(embeddings.dtype) @ embeddings.T).float().softmax(-1)  # [P, K, N, V]
        places = text[:, :, None, None].expand(-1, -1, num_draws, -1)
        right = probs.gather(-1, places)  # [P, K, N, 1]
        agree = probs @ probs.mT  # [P, K, N, N]
        of_right = 2 / (num_tokens * num_draws)
        of_agree = (1 - torch.eye(num_draws, device=agree.device)) / (num_tokens * num_draws * (num_draws - 1))
        score = (right.cumprod(1) * of_right).sum((1, 2, 3)) - (agree.cumprod(1) * of_agree).sum((1, 2, 3))
        if ctx.needs_input_grad[0]:
            # From both, which are small, to the probabilities, and back through the softmax.
            of_probs = (_gradient_of_prefixes(agree) * of_agree * -2) @ probs
            of_probs.scatter_add_(-1, places, _gradient_of_prefixes(right) * of_right)
            of_logits = of_probs.sub_((of_probs * probs).sum(-1, keepdim=True)).mul_(probs)
            ctx.save_for_backward((of_logits.to(embeddings.dtype) @ embeddings).to(states.dtype))
        return score

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None]:
        (of_states,) = ctx.saved_tensors
        return of_states * gradient[:, None, None, None].to(of_states.dtype), None, None


def _gradient_of_prefixes(values: Tensor) -> Tensor:
    """Of ``values.cumprod(1).sum(1)`` for the values ``[P, K, ...]``."""
    parts = []
    for token in range(values.shape[1]):
        others = values.clone()
        others[:, token] = 1
        parts.append(others.cumprod(1)[:, token:].sum(1))
    return torch.stack(parts, dim=1)
