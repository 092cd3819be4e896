"""The posterior of the autoencoder: a diagonal Gaussian over the latent of every patch."""

from dataclasses import dataclass

from torch import Tensor

from calm.functional.gaussian import gaussian_sample
from calm.functional.rng import Generator


@dataclass
class Posterior:
    """Diagonal Gaussian over the latent of every patch.

    Attributes:
        mean: ``[B, L, Z]``.
        log_std: ``[B, L, Z]``.
        token_ids: the encoded tokens, ``[B, L, K]``.
    """

    mean: Tensor
    log_std: Tensor
    token_ids: Tensor | None = None

    def sample(self, num_samples: int, noise: Tensor | None = None, generator: Generator = None) -> Tensor:
        """Return samples ``[num_samples, B, L, Z]``; given standard normal ``noise`` of that shape, deterministic."""
        return gaussian_sample(self.mean, self.log_std, num_samples, noise, generator)
