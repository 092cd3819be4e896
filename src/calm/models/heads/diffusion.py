"""The diffusion head: removes noise step by step to sample the next latent vector.

Shapes: N samples, S sampling steps, D hidden, Z latent, ... any leading dimensions.
"""

from functools import lru_cache
from typing import Any, Literal

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor

from calm.functional.diffusion import (
    DiffusionSchedule,
    add_noise,
    ancestral_step,
    cosine_schedule,
    ddim_step,
    diffusion_loss,
    respace,
)
from calm.functional.rng import Generator, normal, uniform
from calm.models.heads.adaln import AdaptiveNormMLP, reference_names
from calm.models.heads.base import Head, HeadConfig, HeadLoss, leading_shape
from calm.models.heads.registry import register_head
from calm.models.posterior import Posterior


@strict
class DiffusionHeadConfig(HeadConfig):
    r"""
    The head that removes noise from a latent vector step by step.

    Args:
        type: ``"diffusion"``.
        num_mlp_layers: residual blocks.
        hidden_size: width of the blocks; default the backbone's.
        num_samples: N, noisy vectors per position in the loss.
        num_train_timesteps: steps of the process that it is trained on (cosine schedule).
        num_sampling_steps: steps of a sample, evenly spaced over those.
        sampler: ``"ancestral"`` samples every step with the learned variance; ``"ddim"`` is deterministic after the
            first noise and needs fewer steps.
        clip_latent: bound of the entries of the estimated clean latent; default none, as in the paper. Small models
            need one, such as 4: the first steps, of almost pure noise, multiply their errors by ten thousand.
    """

    model_type = "calm_diffusion_head"

    type: Literal["diffusion"] = "diffusion"
    num_mlp_layers: int = 4
    hidden_size: int | None = None
    num_samples: int = 8
    num_train_timesteps: int = 1000
    num_sampling_steps: int = 100
    sampler: Literal["ancestral", "ddim"] = "ancestral"
    clip_latent: float | int | None = None
    layer_norm_eps: float = 1e-6

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        self._check_at_least(
            1, "num_samples", "num_mlp_layers", "num_train_timesteps", "num_sampling_steps", "hidden_size"
        )
        if self.num_sampling_steps > self.num_train_timesteps:
            raise ValueError(
                f"head_config.num_sampling_steps ({self.num_sampling_steps}) must not exceed num_train_timesteps "
                f"({self.num_train_timesteps})."
            )
        if self.clip_latent is not None and not self.clip_latent > 0:
            raise ValueError(f"head_config.clip_latent must be above 0 or null, got {self.clip_latent}.")

    @property
    def num_network_calls(self) -> int:
        return self.num_sampling_steps


@register_head
class DiffusionHead(Head):
    """Iterative denoiser; see :class:`DiffusionHeadConfig`."""

    config_class = DiffusionHeadConfig
    reference_architecture = "DiffusionTransformer"

    def __init__(self, config: DiffusionHeadConfig, hidden_size: int, latent_size: int):
        super().__init__(config, hidden_size, latent_size)
        self.latent_size = latent_size
        self.network = AdaptiveNormMLP(
            latent_size, hidden_size, 2 * latent_size, config.num_mlp_layers, config.layer_norm_eps, config.hidden_size
        )

    def sample(
        self,
        hidden: Tensor,
        noise: Tensor | None = None,
        generator: Generator = None,
        num_samples: int | None = None,
    ) -> Tensor:
        """Sample one latent per hidden state, or ``num_samples``.

        Args:
            noise: standard normal ``[1 + S, (num_samples,) ..., Z]``: the start, then the noise of every step; DDIM
                uses the first only.
        """
        config = self.config
        schedule = _schedule(config.num_train_timesteps, config.num_sampling_steps, hidden.device)
        shape = (*leading_shape(hidden, num_samples), self.latent_size)

        def draw(index: int) -> Tensor:
            # Step by step: the noise of all steps at once would be the largest tensor.
            return noise[index] if noise is not None else normal(shape, generator, hidden.device)

        # Indices on the device, made once, so that no step waits for a transfer.
        steps, timesteps = torch.arange(len(schedule), device=hidden.device).unbind(), schedule.timesteps.unbind()
        x = draw(0)
        for count, index in enumerate(reversed(range(len(schedule))), start=1):
            step = steps[index]
            output = self.network(x, timesteps[index], hidden)
            if config.sampler == "ddim":
                x = ddim_step(output, x, step, schedule, config.clip_latent)
            else:
                x = ancestral_step(output, x, step, schedule, draw(count), config.clip_latent)
        return x.to(hidden.dtype)

    def loss(
        self,
        hidden: Tensor,
        posterior: Posterior,
        noise: Tensor | None = None,
        target_noise: Tensor | None = None,
        generator: Generator = None,
        timestep: Tensor | None = None,
    ) -> HeadLoss:
        """Compute the squared error of the predicted noise of N noisy samples, and the variational bound.

        Args:
            noise: standard normal ``[N, ..., Z]``.
            timestep: ``[N, ...]``, 0 to ``num_train_timesteps`` - 1.
        """
        config = self.config
        schedule = _schedule(config.num_train_timesteps, config.num_train_timesteps, hidden.device)
        targets = posterior.sample(config.num_samples, target_noise, generator).float()
        if noise is None:
            noise = normal(targets.shape, generator, targets.device, row_dim=1)
        if timestep is None:
            time = uniform(targets.shape[:-1], generator, targets.device, row_dim=1)
            timestep = (time * len(schedule)).long()
        output = self.network(add_noise(targets, noise, timestep, schedule), timestep, hidden)
        mse, bound = diffusion_loss(output, targets, noise, timestep, schedule)
        mse, bound = mse.mean(0), bound.mean(0)
        return HeadLoss(mse + bound, {"noise_mse": mse, "variational_bound": bound})

    def init_weights(self) -> None:
        self.network.init_weights()

    @staticmethod
    def reference_names(num_layers: int) -> dict[str, str]:
        return reference_names(num_layers)


def _schedule(num_train_timesteps: int, num_sampling_steps: int, device: torch.device) -> DiffusionSchedule:
    # A compiler cannot see through a cache, and keeps the schedule in its graph instead.
    make = _new_schedule if torch.compiler.is_compiling() else _cached_schedule
    return make(num_train_timesteps, num_sampling_steps, device)


def _new_schedule(num_train_timesteps: int, num_sampling_steps: int, device: torch.device) -> DiffusionSchedule:
    # Not a buffer of the model, which would be lost when a model is built on the meta device and then loaded.
    return respace(cosine_schedule(num_train_timesteps, device), num_sampling_steps)


_cached_schedule = lru_cache(maxsize=16)(_new_schedule)
