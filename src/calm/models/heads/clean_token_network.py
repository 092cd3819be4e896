"""The network of the categorical flow head: what noisy codes and chosen tokens add to the states of the tokens.

Shapes: K tokens of a patch, d code size, R size of the token features, D hidden, W width, ... any leading dimensions.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from calm.models.configuration_heads import CategoricalFlowHeadConfig

_FREQUENCIES = 4  # sinusoids of every token's time


@dataclass
class NetworkInputs:
    """Inputs of :class:`CleanTokenNetwork` beside the hidden states.

    Attributes:
        points: estimates of the codes, ``[..., K, d]``.
        features: expected token features, ``[..., K, R]``.
        chosen: embeddings of the chosen tokens, zero for the others, ``[..., K, D]``.
        time: 1 for chosen tokens, ``[..., K]``; broadcasts against the points.
    """

    points: Tensor
    features: Tensor
    chosen: Tensor
    time: Tensor


class ModulatedBlock(nn.Module):
    """Residual MLP block, shifted, scaled and gated by a condition: ``[..., W], [..., C] -> [..., W]``."""

    def __init__(self, width: int, condition_size: int, eps: float):
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=eps, elementwise_affine=False)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.SiLU(), nn.Linear(2 * width, width))
        self.modulation = nn.Linear(condition_size, 3 * width)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift, scale, gate = self.modulation(condition).chunk(3, dim=-1)
        return x + (1 + gate) * self.mlp(self.norm(x) * (1 + scale) + shift)


class CleanTokenNetwork(nn.Module):
    """Predict what noisy codes and chosen tokens add to the states of the tokens: ``[..., K, D]``.

    The last layer starts at zero, so that an untrained network adds nothing to multi-token prediction.
    """

    gradient_checkpointing = False  # transformers sets it, and the function beside it
    _gradient_checkpointing_func: Callable[..., Tensor]

    def __init__(self, config: CategoricalFlowHeadConfig, patch_size: int, hidden_size: int, width: int):
        super().__init__()
        self.output_shape = (patch_size, hidden_size)
        per_token = config.code_size + config.feature_size + hidden_size
        self.chosen_norm = nn.LayerNorm(hidden_size, eps=config.layer_norm_eps, elementwise_affine=False)
        self.input_proj = nn.Linear(patch_size * per_token, width)
        self.hidden_proj = nn.Linear(hidden_size, width)
        self.time_proj = nn.Linear(patch_size * 2 * _FREQUENCIES, width)
        self.condition_proj = nn.Linear(width, width)
        self.blocks = nn.ModuleList(
            ModulatedBlock(width, width, config.layer_norm_eps) for _ in range(config.num_mlp_layers)
        )
        self.output_layer = nn.Linear(width, patch_size * hidden_size)

    def forward(self, inputs: NetworkInputs, hidden: Tensor) -> Tensor:
        """Return ``[..., K, D]`` for hidden states ``[..., D]``, which broadcast against the points."""
        dtype = hidden.dtype
        context = self.hidden_proj(hidden) + self.time_proj(_sinusoids(inputs.time).flatten(-2).to(dtype))
        condition = F.silu(self.condition_proj(F.silu(context)))
        # Embeddings of a small model are small: without the norm the network would hardly see the chosen tokens.
        parts = [inputs.points, inputs.features, self.chosen_norm(inputs.chosen.to(dtype))]
        x = self.input_proj(torch.cat([part.to(dtype) for part in parts], dim=-1).flatten(-2)) + context
        for block in self.blocks:
            if self.gradient_checkpointing and self.training:
                x = self._gradient_checkpointing_func(block.__call__, x, condition)
            else:
                x = block(x, condition)
        return self.output_layer(x).unflatten(-1, self.output_shape)

    def init_weights(self) -> None:
        """Initialise the modulation and the last layer with zeros, other layers for inputs of unit scale."""
        zero = {self.output_layer, *(block.modulation for block in self.blocks)}
        for module in self.modules():
            if isinstance(module, nn.Linear):
                if module in zero:
                    init.zeros_(module.weight)
                else:
                    init.kaiming_uniform_(module.weight, a=math.sqrt(5))
                init.zeros_(module.bias)


def _sinusoids(time: Tensor) -> Tensor:
    """Return sines and cosines of times in [0, 1]: ``[..., K] -> [..., K, 2 * frequencies]``."""
    rates = torch.logspace(0, math.log10(20), _FREQUENCIES, device=time.device)
    angles = time.float()[..., None] * rates
    return torch.cat([angles.sin(), angles.cos()], dim=-1)
