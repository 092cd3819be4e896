"""The interface of the heads: their configuration, their loss, and how they sample the next latent vector.

Shapes: D hidden, Z latent, N samples in a loss, ... any leading dimensions.
"""

from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor, nn
from transformers import PreTrainedConfig

from calm.functional.rng import Generator
from calm.models.posterior import Posterior


class HeadConfig(PreTrainedConfig):
    """Base of the configurations of the heads.

    A subclass sets ``model_type`` and a field ``type`` whose default is the name of the head in ``head_config.type``.
    """

    base_config_key = "head_config"
    type: str = ""
    num_samples = 1  # passes through the head per position in the loss

    @property
    def num_network_calls(self) -> int:
        """Return the passes through the head's network for one sample."""
        return 1

    def fit_to(self, autoencoder_config: Any) -> None:
        """Check the fields that depend on the autoencoder, and set those that follow from it.

        Raises:
            ValueError: when the head cannot be used with the autoencoder.
        """

    def _check_at_least(self, smallest: int, *names: str, because: str = "") -> None:
        for name in names:
            if getattr(self, name) is not None and getattr(self, name) < smallest:
                raise ValueError(f"head_config.{name} must be at least {smallest}{because}, got {getattr(self, name)}.")


@dataclass
class HeadLoss:
    """Result of :meth:`Head.loss`.

    Attributes:
        loss: of every position, ``[...]``; lower is better.
        metrics: named parts of the loss for the log, each ``[...]``.
        samples: the samples that the loss compares with the target, ``[N, ..., Z]``; for heads with
            ``returns_samples``.
    """

    loss: Tensor
    metrics: dict[str, Tensor] = field(default_factory=dict)
    samples: Tensor | None = None


class Head(nn.Module):
    """Base of the heads. The rest of the package uses a head through these methods and capabilities alone.

    Attributes:
        config_class: configuration of the head; its default ``type`` is the head's name.
        returns_samples: whether the loss returns its samples (``HeadLoss.samples``), with a gradient. The decoded-token
            Brier loss needs them.
        has_log_prob: whether ``sample`` takes ``temperature`` and ``return_log_prob``, and the head has
            ``log_probabilities``: the probability of a patch is known.
        needs_token_codes: whether the latent vectors must be token codes instead of those of a trained autoencoder.
        reference_architecture: name of the model with this head in the checkpoints of the reference implementation;
            None where that has no such head.
        reference_fields: for such a head, name in the reference's configuration and default there, by field of ours.
    """

    config_class: ClassVar[type[HeadConfig]]
    returns_samples: ClassVar[bool] = False
    has_log_prob: ClassVar[bool] = False
    needs_token_codes: ClassVar[bool] = False
    reference_architecture: ClassVar[str | None] = None
    reference_fields: ClassVar[dict[str, tuple[str, Any]]] = {
        "num_mlp_layers": ("num_mlp_layers", 4),
        "num_samples": ("num_samples", 8),
    }

    def __init__(self, config: Any, hidden_size: int, latent_size: int):
        super().__init__()
        self.config = config

    @property
    def _no_split_modules(self) -> list[str]:
        """Return the modules that transformers must put on one device: heads read weights past their layers."""
        return [type(self).__name__]

    def attach(self, token_embeddings: nn.Embedding, autoencoder: nn.Module) -> None:
        """Receive the modules of the model that a head may read; called once, when the model is made."""

    def sample(
        self,
        hidden: Tensor,
        noise: Tensor | None = None,
        generator: Generator = None,
        num_samples: int | None = None,
    ) -> Tensor:
        """Sample one latent per hidden state, ``[..., D] -> [..., Z]``.

        Args:
            noise: the noise of the sample, of a shape that the head defines; given, the result is deterministic.
            generator: one, or a list of one per hidden state (their last dimension but one).
            num_samples: number of independent latents per state, ``[..., D] -> [num_samples, ..., Z]``; what does not
                depend on the noise is computed once per state.
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
        """Compute the loss of predicting the next patch.

        Args:
            hidden: ``[..., D]``.
            posterior: of the true next patch, mean and log_std ``[..., Z]``.
            noise: the head's own noise, of a shape that the head defines.
            target_noise: standard normal ``[M, ..., Z]`` of the samples of the posterior.
            generator: one, or a list of one per row of hidden (its first dimension).
        """
        raise NotImplementedError

    def flops(self) -> tuple[float, float]:
        """Return the FLOPs per patch of the forward pass of the loss, and of one sample.

        By default two operations per parameter of the linear layers and pass: ``config.num_samples`` passes in the
        loss, ``config.num_network_calls`` for a sample.
        """
        one_pass = 2 * sum(module.weight.numel() for module in self.modules() if isinstance(module, nn.Linear))
        return one_pass * self.config.num_samples, one_pass * self.config.num_network_calls

    def init_weights(self) -> None:
        """Initialise what differs from the model's normal initialisation of linear layers; by default nothing."""

    @staticmethod
    def reference_names(num_layers: int) -> dict[str, str]:
        """Return the prefixes of the tensors' names in the reference implementation, by prefix here.

        Args:
            num_layers: residual blocks of the head.
        """
        raise NotImplementedError


def leading_shape(hidden: Tensor, num_samples: int | None) -> tuple[int, ...]:
    """Return the shape of the samples without their last dimension, for hidden states ``[..., D]``."""
    return (*(() if num_samples is None else (num_samples,)), *hidden.shape[:-1])
