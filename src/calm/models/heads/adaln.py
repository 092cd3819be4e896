"""The network of the diffusion and the flow head: an MLP whose blocks are modulated by time and hidden state.

Shapes: D hidden, Z latent, ... any leading dimensions. Source: Li et al. 2024 (MAR), Peebles and Xie 2023 (adaLN).
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

_FREQUENCIES = 256


class TimestepEmbedding(nn.Module):
    """Embed an integer timestep: sinusoids through an MLP, ``[...] -> [..., D]``."""

    def __init__(self, hidden_size: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(_FREQUENCIES, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size))

    def forward(self, timestep: Tensor, dtype: torch.dtype) -> Tensor:
        half = _FREQUENCIES // 2
        exponent = torch.arange(half, dtype=torch.float32, device=timestep.device) / half
        angles = timestep[..., None].float() * (-math.log(10000) * exponent).exp()
        waves = torch.cat([angles.cos(), angles.sin()], dim=-1).to(dtype)
        # Quantised layers need two dimensions, also if all positions have the same time.
        embedded = self.mlp(waves.reshape(-1, _FREQUENCIES))
        return embedded.view(*timestep.shape, embedded.shape[-1])


class ModulatedBlock(nn.Module):
    """Residual MLP block, shifted, scaled and gated by a condition: ``[..., D], [..., D] -> [..., D]``."""

    def __init__(self, hidden_size: int, eps: float):
        super().__init__()
        self.norm = nn.LayerNorm(hidden_size, eps=eps)
        self.mlp = nn.Sequential(nn.Linear(hidden_size, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size))
        self.modulation = nn.Linear(hidden_size, 3 * hidden_size)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift, scale, gate = self.modulation(condition).chunk(3, dim=-1)
        return x + gate * self.mlp(self.norm(x) * (1 + scale) + shift)


class AdaptiveNormMLP(nn.Module):
    """Map noisy latent, timestep and hidden state to a prediction: ``[..., Z], [...], [..., D] -> [..., output]``.

    Timestep and hidden state broadcast against the latents, so that several latents of a state share its part.
    """

    gradient_checkpointing = False  # transformers sets this and the function below
    _gradient_checkpointing_func: Callable[..., Tensor]

    def __init__(
        self,
        latent_size: int,
        hidden_size: int,
        output_size: int,
        num_layers: int,
        eps: float,
        width: int | None = None,
    ):
        super().__init__()
        width = width or hidden_size
        self.input_proj = nn.Linear(latent_size, width)
        self.time_embedding = TimestepEmbedding(width)
        self.hidden_proj = nn.Linear(hidden_size, width)
        self.blocks = nn.ModuleList(ModulatedBlock(width, eps) for _ in range(num_layers))
        self.final_norm = nn.LayerNorm(width, eps=eps, elementwise_affine=False)
        self.final_modulation = nn.Linear(width, 2 * width)
        self.output_layer = nn.Linear(width, output_size)

    def forward(self, x: Tensor, timestep: Tensor, hidden: Tensor) -> Tensor:
        condition = F.silu(self.time_embedding(timestep, hidden.dtype) + self.hidden_proj(hidden))
        x = self.input_proj(x.to(hidden.dtype))
        for block in self.blocks:
            if self.gradient_checkpointing and self.training:
                x = self._gradient_checkpointing_func(block.__call__, x, condition)
            else:
                x = block(x, condition)
        shift, scale = self.final_modulation(condition).chunk(2, dim=-1)
        # The solvers compute in float32, whatever the type of the weights.
        return self.output_layer(self.final_norm(x) * (1 + scale) + shift).float()

    def init_weights(self) -> None:
        """Initialise blocks as the identity and the output at zero; other layers preserve the scale of their input."""
        zero = {self.final_modulation, self.output_layer, *(block.modulation for block in self.blocks)}
        for module in self.modules():
            if isinstance(module, nn.Linear):
                if module in zero:
                    init.zeros_(module.weight)
                elif module in self.time_embedding.mlp:
                    init.normal_(module.weight, std=0.02)
                else:
                    init.xavier_uniform_(module.weight)
                init.zeros_(module.bias)


def reference_names(num_layers: int) -> dict[str, str]:
    """Return the prefixes of a head's tensors in the reference implementation, by prefix here."""
    names = {
        "head.network.input_proj": "generative_head.net.input_proj",
        "head.network.time_embedding": "generative_head.net.time_embed",
        "head.network.hidden_proj": "generative_head.net.cond_embed",
        "head.network.final_modulation": "generative_head.net.final_layer.adaLN_modulation.1",
        "head.network.output_layer": "generative_head.net.final_layer.linear",
    }
    parts = {"norm": "in_ln", "mlp": "mlp", "modulation": "adaLN_modulation.1"}
    for layer in range(num_layers):
        names |= {
            f"head.network.blocks.{layer}.{o}": f"generative_head.net.res_blocks.{layer}.{t}" for o, t in parts.items()
        }
    return names
