"""The flow head: integrates a learned velocity from noise to the next latent vector.

Shapes: N samples, D hidden, Z latent, ... any leading dimensions.
"""

from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from torch import Tensor

from calm.functional.flow import flow_matching_loss, integrate_flow, straight_path
from calm.functional.rng import Generator, normal, uniform
from calm.models.heads.adaln import AdaptiveNormMLP, reference_names
from calm.models.heads.base import Head, HeadConfig, HeadLoss, leading_shape
from calm.models.heads.registry import register_head
from calm.models.posterior import Posterior

_TIME_UNITS = 1000  # the input of the network is the time in these units, a whole number


@strict
class FlowHeadConfig(HeadConfig):
    r"""
    The head that integrates a learned velocity from noise to a latent vector.

    Args:
        type: ``"flow"``.
        num_mlp_layers: residual blocks.
        hidden_size: width of the blocks; default the backbone's.
        num_samples: N, points on paths per position in the loss.
        num_sampling_steps: steps of the solver for a sample.
        solver: ``"midpoint"`` (two passes through the network per step) or ``"euler"`` (one).
    """

    model_type = "calm_flow_head"

    type: Literal["flow"] = "flow"
    num_mlp_layers: int = 4
    hidden_size: int | None = None
    num_samples: int = 8
    num_sampling_steps: int = 10
    solver: Literal["midpoint", "euler"] = "midpoint"
    layer_norm_eps: float = 1e-6

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        self._check_at_least(1, "num_samples", "num_mlp_layers", "num_sampling_steps", "hidden_size")

    @property
    def num_network_calls(self) -> int:
        return self.num_sampling_steps * (2 if self.solver == "midpoint" else 1)


@register_head
class FlowHead(Head):
    """Solver of a learned flow; see :class:`FlowHeadConfig`."""

    config_class = FlowHeadConfig
    reference_architecture = "FlowTransformer"

    def __init__(self, config: FlowHeadConfig, hidden_size: int, latent_size: int):
        super().__init__(config, hidden_size, latent_size)
        self.latent_size = latent_size
        self.network = AdaptiveNormMLP(
            latent_size, hidden_size, latent_size, config.num_mlp_layers, config.layer_norm_eps, config.hidden_size
        )

    def velocity(self, x: Tensor, time: Tensor, hidden: Tensor) -> Tensor:
        """Return the velocity of points ``[..., Z]`` at ``time [...]`` in [0, 1] for hidden states ``[..., D]``."""
        return self.network(x, (time * _TIME_UNITS).long(), hidden)

    def sample(
        self,
        hidden: Tensor,
        noise: Tensor | None = None,
        generator: Generator = None,
        num_samples: int | None = None,
    ) -> Tensor:
        """Sample one latent per hidden state, or ``num_samples``; ``noise`` is standard normal in its shape."""
        if noise is None:
            shape = (*leading_shape(hidden, num_samples), self.latent_size)
            noise = normal(shape, generator, hidden.device)
        config = self.config
        latents = integrate_flow(
            lambda x, time: self.velocity(x, time, hidden), noise, config.num_sampling_steps, config.solver
        )
        return latents.to(hidden.dtype)

    def loss(
        self,
        hidden: Tensor,
        posterior: Posterior,
        noise: Tensor | None = None,
        target_noise: Tensor | None = None,
        generator: Generator = None,
        time: Tensor | None = None,
    ) -> HeadLoss:
        """Compute the squared error of the velocity at N points on paths from noise to samples of the posterior.

        Args:
            noise: standard normal ``[N, ..., Z]``.
            time: uniform in [0, 1], ``[N, ...]``.
        """
        targets = posterior.sample(self.config.num_samples, target_noise, generator).float()
        if noise is None:
            noise = normal(targets.shape, generator, targets.device, row_dim=1)
        if time is None:
            time = uniform(targets.shape[:-1], generator, targets.device, row_dim=1)
        velocity = self.velocity(straight_path(noise, targets, time), time, hidden)
        return HeadLoss(flow_matching_loss(velocity, noise, targets).mean(0))

    def init_weights(self) -> None:
        self.network.init_weights()

    @staticmethod
    def reference_names(num_layers: int) -> dict[str, str]:
        return reference_names(num_layers)
