"""The code table: an untrained autoencoder whose latent vector is the K token codes of a patch, one after the other.

Reconstruction is exact by construction, so a model that uses it has no autoencoder stage.

Shapes: B batch, T = L * K tokens, L patches, K tokens of a patch, d code size, Z = K * d latent, V vocabulary.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from calm.functional.token_codes import smallest_distance, token_codes
from calm.models.best_token import best_token
from calm.models.configuration_codes import TokenCodesConfig
from calm.models.patches import split_patches
from calm.models.posterior import Posterior

# Smallest distance of two codes relative to their length. Rounding to bfloat16 moves a code by 0.004 of its length.
_SMALLEST_DISTANCE = 0.05
_MOST_ROWS = 16_384  # codes that are compared with all others; a large vocabulary is sampled


class CodeDecoder(nn.Module):
    """Split a latent vector into the K codes it consists of: ``[..., Z] -> [..., K, d]``."""

    def __init__(self, patch_size: int):
        super().__init__()
        self.patch_size = patch_size

    def forward(self, latents: Tensor) -> Tensor:
        return latents.unflatten(-1, (self.patch_size, -1))

    def patch_states(self, latents: Tensor) -> Tensor:
        """Return the part of decoding that all tokens share, which is nothing here: ``[..., Z] -> [..., Z]``."""
        return latents

    def token_states(self, patch_states: Tensor, start: int, stop: int) -> Tensor:
        """Return the codes of tokens start to stop: ``[..., Z] -> [..., stop - start, d]``."""
        return self(patch_states)[..., start:stop, :]


class TokenCodes(PreTrainedModel):
    """Map K tokens to their K codes and back; see :class:`TokenCodesConfig`. It has no parameters."""

    config: TokenCodesConfig
    config_class = TokenCodesConfig
    base_model_prefix = "autoencoder"
    main_input_name = "input_ids"
    # It has no attention, so it supports any attention that the language model around it uses.
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True

    codes: Tensor

    def __init__(self, config: TokenCodesConfig):
        super().__init__(config)
        self.register_buffer("codes", token_codes(config.vocab_size, config.code_size, config.code_seed))
        self.decoder = CodeDecoder(config.patch_size)
        self.post_init()

    @property
    def device(self) -> torch.device:
        """Return the device of the codes; transformers looks at parameters, and there are none."""
        return self.codes.device

    @property
    def dtype(self) -> torch.dtype:
        """Return the type of the codes."""
        return self.codes.dtype

    def check_codes(self) -> None:
        """Raise ValueError when two codes are so close that rounding could exchange their tokens."""
        codes = self.codes.float()
        rows = torch.arange(0, len(codes), max(1, len(codes) // _MOST_ROWS), device=codes.device)
        closest = smallest_distance(codes, rows)
        needed = _SMALLEST_DISTANCE * math.sqrt(self.config.code_size)
        if not closest >= needed:
            raise ValueError(
                f"code_size {self.config.code_size} is too small for {self.config.vocab_size} tokens: the closest two "
                f"codes are {closest:.2g} apart, at least {needed:.2g} is needed. Use a larger code_size."
            )

    def encode(self, input_ids: Tensor) -> Posterior:
        """Return the codes of every patch as a posterior without variance: ids ``[B, T]`` -> mean ``[B, L, Z]``."""
        patches = split_patches(input_ids, self.config.patch_size)
        mean = F.embedding(patches, self.codes).flatten(-2)
        return Posterior(mean, torch.full_like(mean, -math.inf), patches)

    def decode(self, latents: Tensor) -> Tensor:
        """Return the scores <z_k, c_v>, whose largest is the nearest code: ``[..., Z] -> [..., K, V]``."""
        return F.linear(self.decoder(latents.to(self.codes.dtype)), self.codes)

    def decode_tokens(self, latents: Tensor) -> Tensor:
        """Return the tokens with the nearest codes: ``[..., Z] -> [..., K]``."""
        return self.best_tokens(self.decoder(latents))

    def best_tokens(self, token_states: Tensor) -> Tensor:
        """Return the token with the nearest code: ``[..., d] -> [...]``."""
        states = token_states.flatten(0, -2).to(self.codes.dtype)
        return best_token(states, self.codes).view(token_states.shape[:-1])
