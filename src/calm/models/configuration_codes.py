"""Configuration of the code table, the autoencoder of the categorical flow head."""

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig


@strict
class TokenCodesConfig(PreTrainedConfig):
    r"""
    The untrained autoencoder whose latent vector is the K token codes of a patch, one after the other.

    Args:
        vocab_size: V, number of token ids.
        patch_size: K, tokens per latent vector.
        code_size: d, dimensions of the code of one token; the latent vector has ``patch_size * code_size``.
        code_seed: seed of the random codes. Codes are also saved with the model.
    """

    model_type = "calm_token_codes"

    vocab_size: int = 128257
    patch_size: int = 4
    code_size: int = 32
    code_seed: int = 0
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        for name in ("vocab_size", "patch_size", "code_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")

    @property
    def latent_size(self) -> int:
        """Return Z, the dimensions of a latent vector."""
        return self.patch_size * self.code_size
