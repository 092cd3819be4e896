"""The Brier score from samples, and BrierLM.

Shapes: n tokens of an n-gram, ... any leading dimensions.
"""

import torch
from torch import Tensor

NGRAM = 4  # tokens of the longest n-gram that BrierLM scores


def brier_estimate(first: Tensor, second: Tensor, target: Tensor) -> Tensor:
    """Estimate the Brier score of every prefix of an n-gram from two independent samples, without bias.

    For samples a and b of the model and the truth y it is ``1{a = y} + 1{b = y} - 1{a = b}``, where equality is that of
    the whole prefix. Its expectation is ``2 P(y) - sum_x P(x)^2``, at most 1. The samples must be independent. If ``a``
    and ``b`` are the same greedy text, the mean estimate is 2 * accuracy - 1: the score of a model that is certain of
    that text, not of the model that was decoded.

    Args:
        first, second, target: token ids ``[..., n]``.

    Returns:
        ``[..., n]`` in float32: Brier-1 to Brier-n of the prefixes.
    """
    if not first.shape == second.shape == target.shape:
        raise ValueError(
            "brier_estimate: first, second and target must have one shape [..., n], got "
            f"{tuple(first.shape)}, {tuple(second.shape)} and {tuple(target.shape)}."
        )
    hit_first = prefix_equal(first, target)
    hit_second = prefix_equal(second, target)
    collision = prefix_equal(first, second)
    return hit_first + hit_second - collision


def prefix_equal(first: Tensor, second: Tensor) -> Tensor:
    """Return 1 where two n-grams agree on the whole prefix, else 0: ``[..., n], [..., n] -> [..., n]`` in float32."""
    return (first == second).float().cumprod(-1)


def brier_lm(brier: Tensor) -> Tensor:
    """Compute BrierLM: 100 times the geometric mean of Brier-1 to Brier-n (n = 4 in the paper).

    Each Brier score is clamped to at least 0 first: the product of two negative scores would be positive.

    Args:
        brier: ``[..., n]``, mean scores (not single-position estimates: the mean comes before the product).

    Returns:
        ``[...]``, from 0 to 100.
    """
    return 100 * torch.as_tensor(brier).clamp(min=0).prod(-1) ** (1 / brier.shape[-1])
