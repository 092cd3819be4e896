"""The decoded-token Brier loss: the Brier score of the tokens that the samples of a head decode to.

The energy score depends on the distance of samples to the true latent, and of two samples at the same distance one may
decode to the true token and the other may not. This loss decodes the samples: the average of the decoder's token
distributions over N samples is the prediction, and the Brier score of its n-grams is a proper scoring rule for it, with
a gradient. Evaluation computes the same score from tokens (BrierLM).

Shapes: N samples of the head, P positions, K tokens of a patch, E decoder states, V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor

from calm.functional.brier import NGRAM
from calm.functional.tiles import rows_at_once

_TILE_ELEMENTS = 2**20  # of a (positions x tokens x samples x vocabulary) tensor: 4 MiB in float32


def decoded_brier(states: Tensor, embeddings: Tensor, text: Tensor) -> Tensor:
    """Compute the mean of Brier-1 to Brier-n of the first n = min(K, 4) tokens, ``[P]``; at most 1.

    Only pairs of different samples count for the self-match probability, so the score is unbiased for the average over
    infinitely many samples. Only the states have a gradient, and only tensors of their size are kept for it:
    probabilities exist for one tile at a time.

    Args:
        states: states of the decoder for N >= 2 samples, ``[N, P, K, E]``.
        embeddings: output layer of the decoder, ``[V, E]``.
        text: token ids of the next patch ``[P, K]``.
    """
    longest = min(states.shape[2], NGRAM)
    states, text = states[:, :, :longest].permute(1, 2, 0, 3), text[:, :longest]
    # Products with the vocabulary have the precision of the model; probabilities are in float32.
    device = states.device.type
    embeddings = embeddings.to(torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else states.dtype)
    size = rows_at_once(longest * states.shape[2] * len(embeddings), states.device, _TILE_ELEMENTS)
    tiles = zip(states.split(size), text.split(size), strict=True)
    scores: list[Tensor] = [_DecodedBrier.apply(tile, embeddings, tokens) for tile, tokens in tiles]
    return torch.cat(scores)


class _DecodedBrier(torch.autograd.Function):
    """``[P, K, N, E], [V, E], [P, K] -> [P]``."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, embeddings: Tensor, text: Tensor) -> Tensor:
        with torch.autocast(states.device.type, enabled=False):
            return _DecodedBrier._forward(ctx, states, embeddings, text)

    @staticmethod
    def _forward(ctx: Any, states: Tensor, embeddings: Tensor, text: Tensor) -> Tensor:
        num_tokens, num_samples = states.shape[1:3]
        probs = (states.to(embeddings.dtype) @ embeddings.T).float().softmax(-1)  # [P, K, N, V]
        places = text[:, :, None, None].expand(-1, -1, num_samples, -1)
        right = probs.gather(-1, places)  # [P, K, N, 1]
        agree = probs @ probs.mT  # [P, K, N, N]
        of_right = 2 / (num_tokens * num_samples)
        of_agree = (1 - torch.eye(num_samples, device=agree.device)) / (num_tokens * num_samples * (num_samples - 1))
        score = (right.cumprod(1) * of_right).sum((1, 2, 3)) - (agree.cumprod(1) * of_agree).sum((1, 2, 3))
        if ctx.needs_input_grad[0]:
            # The gradients of both, which are small, give that of the probabilities; then back through the softmax.
            of_probs = (_gradient_of_prefixes(agree) * of_agree * -2) @ probs
            of_probs.scatter_add_(-1, places, _gradient_of_prefixes(right) * of_right)
            of_logits = of_probs.sub_((of_probs * probs).sum(-1, keepdim=True)).mul_(probs)
            ctx.save_for_backward((of_logits.to(embeddings.dtype) @ embeddings).to(states.dtype))
        return score

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (of_states,) = ctx.saved_tensors
        return of_states * gradient[:, None, None, None].to(of_states.dtype), None, None


def _gradient_of_prefixes(values: Tensor) -> Tensor:
    """Return the gradient of ``values.cumprod(1).sum(1)`` with respect to the values ``[P, K, ...]``."""
    parts = []
    for token in range(values.shape[1]):
        others = values.clone()
        others[:, token] = 1
        parts.append(others.cumprod(1)[:, token:].sum(1))
    return torch.stack(parts, dim=1)
