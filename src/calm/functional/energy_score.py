"""The energy score: a strictly proper scoring rule that needs samples only.

The energy head calls ``energy_score_terms`` for some rows at a time, so that the target samples of all rows are never
held at once.

Shapes: N model samples, M target samples, Z latent dimensions, ... any leading dimensions.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

# A squared distance is a difference of squares; below this many roundings of them it counts as zero.
_ROUNDING = 16


def energy_score(samples: Tensor, targets: Tensor, alpha: float = 1.0) -> Tensor:
    """Compute the energy score of a sampled prediction; higher is better.

    ``mean_{i != j} |x_i - x_j|^alpha - 2 mean_{i, m} |x_i - y_m|^alpha``. In expectation it is largest exactly when the
    samples follow the distribution of the targets, for every ``0 < alpha < 2``.

    Args:
        samples: ``[N, ..., Z]``, N >= 2 independent samples of the model.
        targets: ``[M, ..., Z]``, M >= 1 independent samples of the truth.
        alpha: exponent of the distance, in (0, 2).

    Returns:
        ``[...]``, in float32 at least.

    Raises:
        ValueError: for N < 2, for shapes that do not fit, for alpha outside (0, 2).
    """
    diversity, fidelity = energy_score_terms(samples, targets, alpha)
    return diversity - 2 * fidelity


def energy_score_terms(
    samples: Tensor, targets: Tensor, alpha: float = 1.0, is_centered: bool = False
) -> tuple[Tensor, Tensor]:
    """Compute the two terms of :func:`energy_score`: ``score = diversity - 2 * fidelity``.

    Args:
        samples, targets, alpha: as in :func:`energy_score`.
        is_centered: whether the origin is among the points already, such as at the mean of the truth. By default the
            mean of the targets is subtracted: the score does not depend on the origin, but its rounding error does.

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

    dtype = torch.promote_types(torch.promote_types(samples.dtype, targets.dtype), torch.float32)
    x = samples.movedim(0, -2).to(dtype)  # [..., N, Z]: the distances are batched over the leading dimensions
    y = targets.movedim(0, -2).to(dtype)
    diversity = _mean_distance_of_pairs(x, alpha)
    if not is_centered:
        center = y.mean(-2, keepdim=True).detach()
        x, y = x - center, y - center
    return diversity, mean_distance(x, y, alpha)


def _mean_distance_of_pairs(x: Tensor, alpha: float) -> Tensor:
    """Return the mean ``|x_i - x_j|^alpha`` over ``i != j``: ``[..., N, Z] -> [...]``."""
    num_points = x.shape[-2]
    x = x - x.mean(-2, keepdim=True).detach()
    # The N distances of a point to itself are zero, and are left out of the count.
    return mean_distance(x, x, alpha) * (num_points / (num_points - 1))


def mean_distance(x: Tensor, y: Tensor, alpha: float = 1.0) -> Tensor:
    """Return the mean ``|x_i - y_j|^alpha`` over all i and j: ``[..., N, Z], [..., M, Z] -> [...]``.

    Distances come from one matrix product, ``|x|^2 + |y|^2 - 2 x y``, so the origin must be among the points, which are
    in float32 at least. Points whose distance is within rounding error count as equal, with distance and gradient zero.
    The tensors kept for the backward pass have the size of x (and of y, if y needs a gradient), not of N times M.
    """
    return _MeanDistance.apply(x, y, alpha, torch.is_grad_enabled())


@contextmanager
def full_float32() -> Iterator[None]:
    """Disable TF32 in matrix products: its rounding error would be as large as the distances."""
    if torch.compiler.is_compiling():  # a compiled graph uses the setting at the time it runs
        yield
        return
    backends = torch.backends.cuda.matmul
    name, wanted = ("fp32_precision", "ieee") if hasattr(torch.backends, "fp32_precision") else ("allow_tf32", False)
    before = getattr(backends, name)
    setattr(backends, name, wanted)
    try:
        yield
    finally:
        setattr(backends, name, before)


class _MeanDistance(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, y: Tensor, alpha: float, with_gradients: bool) -> Tensor:
        wants_x, wants_y = (with_gradients and wanted for wanted in ctx.needs_input_grad[:2])
        # In half precision the difference of squares would be all rounding error.
        with torch.autocast(x.device.type, enabled=False), full_float32():
            sizes = x.square().sum(-1)[..., :, None] + y.square().sum(-1)[..., None, :]
            squares = torch.matmul(x, y.mT).mul_(-2).add_(sizes)  # [..., N, M]
            # The comparison is negated so that NaN distances propagate.
            apart = ~(squares <= sizes.mul_(_ROUNDING * torch.finfo(x.dtype).eps))
            squares = torch.where(apart, squares, 1.0)
            powers = squares.pow(alpha / 2) * apart
            gradient_x, gradient_y = None, None
            if wants_x or wants_y:
                # The gradient of |x_i - y_j|^alpha is this weight times (x_i - y_j).
                weights = powers / squares * (alpha / (x.shape[-2] * y.shape[-2]))
                gradient_x = weights.sum(-1, keepdim=True) * x - weights @ y if wants_x else None
                gradient_y = weights.sum(-2).unsqueeze(-1) * y - weights.mT @ x if wants_y else None
        ctx.save_for_backward(gradient_x, gradient_y)
        return powers.mean((-2, -1))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        gradient = gradient[..., None, None]
        of_x, of_y = (None if part is None else gradient * part for part in ctx.saved_tensors)
        return of_x, of_y, None, None
