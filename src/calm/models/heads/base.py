"""What every head does: ``sample`` a latent from a hidden state, and say how wrong it is in ``loss``."""

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from calm.functional.rng import Generator
from calm.models.modeling_autoencoder import Posterior


@dataclass
class HeadLoss:
    """``loss`` of every position ``[...]`` (lower is better) and named parts of it for the log, each ``[...]``.

    ``samples`` are the draws ``[N, ..., Z]`` that it compares with the target, for heads that draw in their loss.
    """

    loss: Tensor
    metrics: dict[str, Tensor] = field(default_factory=dict)
    samples: Tensor | None = None


class Head(nn.Module):
    """Base of the heads. To the rest of the model a head is a black box that gives samples.

    Attributes:
        has_log_prob: whether ``sample`` takes ``temperature`` and ``return_log_prob``.
    """

    has_log_prob = False

    def attach(self, token_embeddings: nn.Embedding, autoencoder: nn.Module) -> None:
        """Receive the modules of the model that a head may read; called once, when the model is made."""

    def sample(
        self,
        hidden: Tensor,
        noise: Tensor | None = None,
        generator: Generator = None,
        num_samples: int | None = None,
    ) -> Tensor:
        """One latent per hidden state, ``[..., D] -> [..., Z]``; given ``noise``, deterministic.

        Args:
            generator: one, or a list of one per hidden state (their last dimension but one).
            num_samples: draw so many independent latents per state instead, ``[..., D] -> [num_samples, ..., Z]``;
                what does not depend on the noise is computed once per state.
        """
        raise NotImplementedError

    def loss(
        self,
        hidden: Tensor,
        posterior: Posterior,
        noise: Tensor | None = None,
        target_noise: Tensor | None = None,
        generator: Generator = None,
    ) -> HeadLoss:
        """Loss of predicting the next patch.

        Args:
            hidden: ``[..., D]``.
            posterior: of the true next patch, mean and log_std ``[..., Z]``.
            noise: the head's own noise; its shape is the head's matter.
            target_noise: standard normal ``[M, ..., Z]`` of the draws from the posterior.
            generator: one, or a list of one per row of hidden (its first dimension).
        """
        raise NotImplementedError

    def flops(self) -> tuple[float, float]:
        """Return the FLOPs per patch of the forward pass of the loss, and of one sample.

        Counted are two operations per parameter of the linear layers.
        """
        config: Any = self.config
        one_pass = 2 * sum(module.weight.numel() for module in self.modules() if isinstance(module, nn.Linear))
        return one_pass * config.num_samples, one_pass * config.num_network_calls

    def init_weights(self) -> None:
        """What the head wants beyond the model's normal initialisation of linear layers."""
        raise NotImplementedError


def leading_shape(hidden: Tensor, num_samples: int | None) -> tuple[int, ...]:
    """Shape of the draws without their last dimension, for hidden states ``[..., D]``."""
    return (*(() if num_samples is None else (num_samples,)), *hidden.shape[:-1])
