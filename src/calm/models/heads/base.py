"""What every head does: ``sample`` a latent from a hidden state, and say how wrong it is in ``loss``."""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from calm.models.modeling_autoencoder import Posterior


@dataclass
class HeadLoss:
    """``loss`` of every position ``[...]`` (lower is better) and named parts of it for the log, each ``[...]``."""

    loss: Tensor
    metrics: dict[str, Tensor] = field(default_factory=dict)


class Head(nn.Module):
    """Base of the heads. To the rest of the model a head is a black box that gives samples."""

    output_layer: nn.Linear  # the last layer, which the model initialises to zero

    def sample(self, hidden: Tensor, noise: Tensor | None = None, generator: torch.Generator | None = None) -> Tensor:
        """One latent per hidden state, ``[..., D] -> [..., Z]``; given ``noise``, deterministic."""
        raise NotImplementedError

    def loss(
        self,
        hidden: Tensor,
        posterior: Posterior,
        noise: Tensor | None = None,
        target_noise: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> HeadLoss:
        """Loss of predicting the next patch.

        Args:
            hidden: ``[..., D]``.
            posterior: of the true next patch, mean and log_std ``[..., Z]``.
            noise: the head's own noise; its shape is the head's matter.
            target_noise: standard normal ``[M, ..., Z]`` of the draws from the posterior.
        """
        raise NotImplementedError
