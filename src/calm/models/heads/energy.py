"""The energy head: noise and a hidden state in, a latent vector out, in one step.

Shapes: N head samples, M target draws, S possible next patches, D hidden, Z latent, U noise, ... any leading
dimensions.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from calm.functional.energy_score import mean_distance, mean_distance_of_pairs
from calm.functional.rng import Generator, normal, of_rows, uniform
from calm.functional.tiles import rows_at_once
from calm.models.configuration_heads import EnergyHeadConfig
from calm.models.heads.activated_linear import gated_silu_linear, is_plain, silu_linear
from calm.models.heads.base import Head, HeadLoss, leading_shape
from calm.models.modeling_autoencoder import Posterior


class GatedBlock(nn.Module):
    """Residual block that refines ``x`` under a condition through a gated MLP: ``[..., D], [..., D] -> [..., D]``."""

    def __init__(self, hidden_size: int, eps: float):
        super().__init__()
        self.norm = nn.LayerNorm(hidden_size, eps=eps)
        self.mix = nn.Linear(2 * hidden_size, hidden_size)
        self.mlp = nn.Sequential(
            nn.SiLU(), nn.Linear(hidden_size, hidden_size), nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size)
        )
        self.down_proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        first, second = self.mlp[1], self.mlp[3]
        gate_up = silu_linear(silu_linear(self._mixed(self.norm(x), condition), first), second)
        return x + gated_silu_linear(gate_up, self.down_proj)

    def _mixed(self, x: Tensor, condition: Tensor) -> Tensor:
        """``mix([x, condition])``. Its condition half does not depend on the noise: computed once per hidden state, it
        broadcasts over the samples."""
        if not is_plain(self.mix):
            return self.mix(torch.cat([x, condition.expand_as(x)], dim=-1))
        x_weight, condition_weight = self.mix.weight.chunk(2, dim=1)
        return F.linear(x, x_weight).add_(F.linear(condition, condition_weight, self.mix.bias))


class EnergyHead(Head):
    """Single-step generator of the next latent; see :class:`~calm.models.configuration_heads.EnergyHeadConfig`."""

    gradient_checkpointing = False  # transformers sets it, and the function beside it
    _gradient_checkpointing_func: Callable[..., Tensor]

    def __init__(self, config: EnergyHeadConfig, hidden_size: int, latent_size: int):
        super().__init__()
        self.config = config
        eps, width = config.layer_norm_eps, config.hidden_size or hidden_size
        self.noise_proj = nn.Linear(config.noise_size, width)
        self.noise_norm = nn.LayerNorm(width, eps=eps)
        self.hidden_proj = nn.Linear(hidden_size, width)
        self.hidden_norm = nn.LayerNorm(width, eps=eps)
        self.blocks = nn.ModuleList(GatedBlock(width, eps) for _ in range(config.num_mlp_layers))
        self.final_norm = nn.LayerNorm(width, eps=eps)
        self.final_mlp = nn.Sequential(nn.Linear(width, width), nn.SiLU())
        self.output_layer = nn.Linear(width, latent_size)

    def sample(
        self,
        hidden: Tensor,
        noise: Tensor | None = None,
        generator: Generator = None,
        num_samples: int | None = None,
    ) -> Tensor:
        """One latent per hidden state, or ``num_samples``.

        Args:
            noise: uniform in [-0.5, 0.5], ``[..., U]``; extra leading dimensions give several samples per state.
        """
        if noise is None:
            noise = self.draw_noise(hidden, num_samples, generator)
        x = self.noise_norm(self.noise_proj(noise))
        condition = self.hidden_norm(self.hidden_proj(hidden))
        if self.config.condition_residual:
            x = x + condition
        for block in self.blocks:
            if self.gradient_checkpointing and self.training:
                x = self._gradient_checkpointing_func(block.__call__, x, condition)
            else:
                x = block(x, condition)
        return silu_linear(self.final_mlp[0](self.final_norm(x)), self.output_layer)

    def draw_noise(
        self, hidden: Tensor, num_samples: int | None = None, generator: Generator = None, row_dim: int = -2
    ) -> Tensor:
        """Uniform noise in [-0.5, 0.5]: ``[(num_samples,) ..., U]`` for hidden states ``[..., D]``."""
        shape = (*leading_shape(hidden, num_samples), self.config.noise_size)
        return uniform(shape, generator, hidden.device, hidden.dtype, row_dim) - 0.5

    def loss(
        self,
        hidden: Tensor,
        posterior: Posterior,
        noise: Tensor | None = None,
        target_noise: Tensor | None = None,
        generator: Generator = None,
    ) -> HeadLoss:
        """Negative energy score of N draws against M draws of the posterior; noise ``[N, B, ..., U]``.

        Of S possible next patches, each gives M / S of the draws; ValueError where S does not divide M.
        """
        config = self.config
        mean, std = posterior.mean.float(), posterior.log_std.float().exp()
        if mean.dim() == hidden.dim():
            mean, std = mean[None], std[None]
        if config.num_target_samples % len(mean):
            raise ValueError(
                f"num_target_samples ({config.num_target_samples}) of the energy head must be a multiple of the "
                f"{len(mean)} possible next patches: every one gives as many targets."
            )
        center = mean.mean(0)
        if noise is None:
            noise = self.draw_noise(hidden, config.num_samples, generator, row_dim=1)
        samples = self.sample(hidden, noise)
        # Distances do not change with the origin; that of the differences of squares lies among the points.
        errors = (samples.float() - center).movedim(0, -2)  # [..., N, Z]
        diversity = self._distance(mean_distance_of_pairs, errors)
        fidelity = self._fidelity(errors, mean - center, std, target_noise, generator)
        loss = 2 * fidelity - diversity
        metrics = {"energy_score": -loss, "fidelity": fidelity, "diversity": diversity}
        if config.mean_pull_weight:
            pull = errors.mean(-2).square().sum(-1)
            loss = loss + config.mean_pull_weight * pull
            metrics["mean_pull"] = pull
        return HeadLoss(loss, metrics, samples)

    def _fidelity(
        self, errors: Tensor, mean: Tensor, std: Tensor, target_noise: Tensor | None, generator: Generator
    ) -> Tensor:
        """Mean distance of the samples ``[..., N, Z]`` to M draws of the posteriors ``[S, ..., Z]``, ``[...]``.

        A few rows at a time: their draws are all that is held at once, and nothing of them is kept for the backward
        pass.
        """
        num_patches, num_rows = mean.shape[:2]
        of_row = (*mean.shape[2:-1], self.config.num_target_samples, mean.shape[-1])
        size = rows_at_once(math.prod(of_row), mean.device, in_cache=1)  # on a CPU a row fills the cache
        distances = []
        for rows in (slice(start, min(start + size, num_rows)) for start in range(0, num_rows, size)):
            if target_noise is None:
                source = of_rows(generator, rows)
                noise = normal((rows.stop - rows.start, *of_row), source, std.device, row_dim=0)
            else:
                noise = target_noise[:, rows].movedim(0, -2).float().clone()
            targets = noise.unflatten(-2, (num_patches, -1))  # [rows, ..., S, M / S, Z]
            targets.mul_(std[:, rows].movedim(0, -2).unsqueeze(-2))
            if num_patches > 1:
                targets.add_(mean[:, rows].movedim(0, -2).unsqueeze(-2))
            targets = targets.flatten(-3, -2)
            distances.append(self._distance(mean_distance, errors[rows], targets))
        return torch.cat(distances)

    def _distance(self, kind: Callable[..., Tensor], *points: Tensor) -> Tensor:
        """Mean distance of points ``[..., n, Z]``, plus, where the loss wants them, those of groups of dimensions."""
        alpha, groups = self.config.alpha, self.config.num_latent_groups
        whole = kind(*points, alpha)
        if groups == 1:
            return whole
        parts = [each.unflatten(-1, (groups, -1)).movedim(-2, -3) for each in points]  # [..., groups, n, Z / groups]
        # So that, together, they pull at a dimension as much as the whole does.
        return whole + kind(*parts, alpha).sum(-1) / groups**0.5

    def init_weights(self) -> None:
        """Every sample starts at the same point: the first steps learn where the latents lie, then their spread."""
        init.zeros_(self.output_layer.weight)
        init.zeros_(self.output_layer.bias)
