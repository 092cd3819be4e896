"""The energy head: noise and a hidden state in, a latent vector out, in one step.

Shapes: N head samples, M target samples, D hidden, Z latent, U noise, B rows, ... any leading dimensions.
"""

import math
from collections.abc import Callable, Sequence
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import initialization as init

from calm.functional.energy_score import energy_score_terms
from calm.functional.rng import Generator, normal, uniform
from calm.functional.tiles import rows_at_once
from calm.models.heads.activated_linear import gated_silu_linear, is_plain, silu_linear
from calm.models.heads.base import Head, HeadConfig, HeadLoss, leading_shape
from calm.models.heads.registry import register_head
from calm.models.posterior import Posterior
from calm.utils.deprecation import REMOVED_ENERGY_FIELDS, drop_removed


@strict
class EnergyHeadConfig(HeadConfig):
    r"""
    The head that maps uniform noise and a hidden state to a latent vector, trained by the energy score.

    Args:
        type: ``"energy"``.
        num_mlp_layers: residual blocks. The paper takes a quarter of the backbone's layers.
        hidden_size: width of the blocks; default, and in the paper, the backbone's.
        noise_size: entries of the uniform noise.
        num_samples: N, draws of the head per position in the loss.
        num_target_samples: M, draws of the true patch's posterior per position in the loss.
        alpha: exponent of the energy score, in (0, 2).
        condition_residual: whether the hidden state also enters the residual stream, beside the noise. In the paper it
            acts through the gates of the blocks alone, which start out almost closed: small models on small budgets
            then hardly learn to look at their context.
    """

    model_type = "calm_energy_head"

    type: Literal["energy"] = "energy"
    num_mlp_layers: int = 4
    hidden_size: int | None = None
    noise_size: int = 64
    num_samples: int = 8
    num_target_samples: int = 100
    alpha: float | int = 1.0
    condition_residual: bool = False
    layer_norm_eps: float = 1e-6

    def __post_init__(self, **kwargs):
        drop_removed(kwargs, REMOVED_ENERGY_FIELDS, "head_config")
        super().__post_init__(**kwargs)
        self._check_at_least(2, "num_samples", because=" (the score compares pairs)")
        self._check_at_least(1, "num_target_samples", "noise_size", "num_mlp_layers", "hidden_size")
        if not 0 < self.alpha < 2:
            raise ValueError(f"head_config.alpha must lie in (0, 2), got {self.alpha}.")


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


@register_head
class EnergyHead(Head):
    """Single-step generator of the next latent; see :class:`EnergyHeadConfig`."""

    config_class = EnergyHeadConfig
    returns_samples = True
    reference_architecture = "EnergyTransformer"
    reference_fields: ClassVar = Head.reference_fields | {"noise_size": ("noise_size", 64), "alpha": ("beta", 1.0)}
    gradient_checkpointing = False  # transformers sets it, and the function beside it
    _gradient_checkpointing_func: Callable[..., Tensor]

    def __init__(self, config: EnergyHeadConfig, hidden_size: int, latent_size: int):
        super().__init__(config, hidden_size, latent_size)
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
        """Return the negative energy score of N samples against M samples of the posterior.

        Args:
            noise: uniform in [-0.5, 0.5], ``[N, B, ..., U]``.
            target_noise: standard normal, ``[M, B, ..., Z]``.
        """
        config = self.config
        if noise is None:
            noise = self.draw_noise(hidden, config.num_samples, generator, row_dim=1)
        samples = self.sample(hidden, noise)
        # The score does not depend on the origin; its rounding error is smallest with the origin among the points.
        errors = samples.float() - posterior.mean.float()  # [N, B, ..., Z]
        std = posterior.log_std.float().exp()
        # Some rows at a time: only their target samples exist at once, and none is kept for the backward pass.
        shape = (config.num_target_samples, std.shape[-1])
        size = rows_at_once(math.prod((*std.shape[1:-1], *shape)), std.device, in_cache=1)  # one row fills the cache
        terms = []
        for start in range(0, len(std), size):
            rows = slice(start, min(start + size, len(std)))
            if target_noise is None:
                source = generator[rows] if isinstance(generator, Sequence) else generator
                targets = normal((*std[rows].shape[:-1], *shape), source, std.device, row_dim=0)
            else:
                targets = target_noise[:, rows].movedim(0, -2).float().clone()
            targets.mul_(std[rows].unsqueeze(-2))  # [rows, ..., M, Z], relative to the mean of the posterior
            terms.append(energy_score_terms(errors[:, rows], targets.movedim(-2, 0), config.alpha, is_centered=True))
        diversity, fidelity = (torch.cat(parts) for parts in zip(*terms, strict=True))
        score = diversity - 2 * fidelity
        return HeadLoss(-score, {"energy_score": score, "fidelity": fidelity, "diversity": diversity}, samples)

    def init_weights(self) -> None:
        """Every sample starts at the same point: the first steps learn where the latents lie, then their spread."""
        init.zeros_(self.output_layer.weight)
        init.zeros_(self.output_layer.bias)

    @staticmethod
    def reference_names(num_layers: int) -> dict[str, str]:
        names = {
            "head.noise_proj": "mlp_generator.noise_embd",
            "head.noise_norm": "mlp_generator.norm_noise",
            "head.hidden_proj": "mlp_generator.hidden_embd",
            "head.hidden_norm": "mlp_generator.norm_hidden",
            "head.final_norm": "mlp_generator.final_layer.in_ln",
            "head.final_mlp.0": "mlp_generator.final_layer.linears.0",
            "head.output_layer": "mlp_generator.final_layer.linears.2",
        }
        parts = {"norm": "in_ln", "mix": "linears.0", "mlp.1": "linears.2", "mlp.3": "linears.4"}
        parts["down_proj"] = "down_proj"
        for layer in range(num_layers):
            names |= {f"head.blocks.{layer}.{o}": f"mlp_generator.mlp_blocks.{layer}.{t}" for o, t in parts.items()}
        return names
