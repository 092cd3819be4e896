"""The energy score: a strictly proper scoring rule that needs samples only.

Shapes: N model samples, M target samples, Z latent dimensions, ... any leading dimensions.
"""

import torch
from torch import Tensor


def energy_score(samples: Tensor, targets: Tensor, alpha: float = 1.0) -> Tensor:
    """Energy score of a sampled prediction; higher is better.

    ``mean_{i != j} |x_i - x_j|^alpha - 2 mean_{i, m} |x_i - y_m|^alpha``. In expectation it is largest
    exactly when the samples follow the distribution of the targets, for every ``0 < alpha < 2``.

    Args:
        samples: ``[N, ..., Z]``, N >= 2 independent draws of the model.
        targets: ``[M, ..., Z]``, M >= 1 independent draws of the truth.
        alpha: exponent of the distance, in (0, 2).

    Returns:
        ``[...]``, in float32 at least.

    Raises:
        ValueError: for N < 2, for shapes that do not fit, for alpha outside (0, 2).
    """
    diversity, fidelity = energy_score_terms(samples, targets, alpha)
    return diversity - 2 * fidelity


def energy_score_terms(samples: Tensor, targets: Tensor, alpha: float = 1.0) -> tuple[Tensor, Tensor]:
    """The two terms of :func:`energy_score`: ``score = diversity - 2 * fidelity``.

    Returns:
        ``(diversity, fidelity)``, each ``[...]``: the mean distance between two different samples, and the
        mean distance between a sample and a target.
    """
    num_samples = samples.shape[0]
    if num_samples < 2:
        raise ValueError(
            f"energy_score needs at least 2 samples (the first dimension), got {num_samples}: "
            "the diversity term compares pairs; draw more samples."
        )
    if samples.shape[1:] != targets.shape[1:]:
        raise ValueError(
            "energy_score: samples [N, ..., Z] and targets [M, ..., Z] must agree after the first dimension, "
            f"got {tuple(samples.shape)} and {tuple(targets.shape)}."
        )
    if not 0 < alpha < 2:
        raise ValueError(f"energy_score: alpha must lie in (0, 2), got {alpha}: at 2 the score is not strictly proper.")

    x = samples.movedim(0, -2)  # [..., N, Z]: the pairwise distances are batched over the leading dimensions
    y = targets.movedim(0, -2)
    # The N distances of a sample to itself are zero and drop out of the sum.
    diversity = _pairwise_distance(x, x, alpha).sum((-2, -1)) / (num_samples * (num_samples - 1))
    fidelity = _pairwise_distance(x, y, alpha).mean((-2, -1))
    return diversity, fidelity


def _pairwise_distance(x: Tensor, y: Tensor, alpha: float) -> Tensor:
    """``|x_i - y_j|^alpha``: ``[..., N, Z], [..., M, Z] -> [..., N, M]``, with zero gradient at zero distance."""
    dtype = torch.promote_types(torch.promote_types(x.dtype, y.dtype), torch.float32)
    # The exact mode: through a matrix product, distances near zero would lose all their digits.
    distance = torch.cdist(x.to(dtype), y.to(dtype), compute_mode="donot_use_mm_for_euclid_dist")
    if alpha == 1:
        return distance
    # d^alpha has an infinite slope at 0 for alpha < 1; keep the power away from 0 and put the zero back.
    positive = distance > 0
    return torch.where(positive, distance, 1.0).pow(alpha) * positive
