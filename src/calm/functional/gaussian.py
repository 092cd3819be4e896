"""The diagonal Gaussian posterior of the autoencoder.

Shapes: M samples, Z latent dimensions, ... any leading dimensions.
"""

import torch
from torch import Tensor

from calm.functional.rng import Generator, normal


def gaussian_kl(mean: Tensor, log_std: Tensor, clip: float = 0.5) -> Tensor:
    """Compute the KL divergence of N(mean, std^2) to N(0, I) in nats, with a floor per dimension.

    Below the floor a dimension has no gradient: without it dimensions collapse to the prior.

    Args:
        mean: ``[..., Z]``.
        log_std: ``[..., Z]``.
        clip: the floor of each dimension in nats; 0 gives the plain KL.

    Returns:
        ``[...]``, summed over Z, in float32 at least.
    """
    return gaussian_kl_per_dimension(mean, log_std).clamp(min=clip).sum(-1)


def gaussian_kl_per_dimension(mean: Tensor, log_std: Tensor) -> Tensor:
    """Compute the KL divergence of each dimension to N(0, 1) in nats, without a floor: ``[..., Z] -> [..., Z]``."""
    dtype = torch.promote_types(mean.dtype, torch.float32)
    mean, log_std = mean.to(dtype), log_std.to(dtype)
    return 0.5 * (mean.square() + (2 * log_std).exp() - 1 - 2 * log_std)


def gaussian_sample(
    mean: Tensor,
    log_std: Tensor,
    num_samples: int,
    noise: Tensor | None = None,
    generator: Generator = None,
) -> Tensor:
    """Sample from N(mean, std^2): ``[..., Z], [..., Z] -> [num_samples, ..., Z]``.

    Args:
        noise: standard normal ``[num_samples, ..., Z]``; given, the result is deterministic.
        generator: source of the noise otherwise; one, or a list of one per row of the mean (its first dimension).
    """
    if noise is None:
        noise = normal((num_samples, *mean.shape), generator, mean.device, mean.dtype, row_dim=1)
    return torch.addcmul(mean, noise, log_std.exp())
