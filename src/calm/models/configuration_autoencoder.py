"""Configuration of the autoencoder."""

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from calm.models.auto_classes import current_model_type, register_configuration, register_models
from calm.models.limits import check_sizes


@strict
class CalmAutoencoderConfig(PreTrainedConfig):
    r"""
    The autoencoder that turns K tokens into one latent vector and back. The defaults are the paper's (75M parameters).

    Args:
        vocab_size: V, number of token ids.
        patch_size: K, tokens per latent vector.
        hidden_size: width of every block.
        embedding_size: width of the token embeddings; default ``hidden_size``, as in the paper. A smaller one makes
            decoding cheaper by the same factor: nearly all of its cost is the product with the vocabulary.
        intermediate_size: width inside the SwiGLU blocks.
        latent_size: Z, dimensions of the latent vector.
        num_encoder_layers: blocks of the encoder, an even number: one half per token, one half per patch.
        num_decoder_layers: likewise of the decoder, first per patch, then per token.
        token_dropout: probability of replacing an input token while training, so that the latent spreads a token's
            information over its neighbours.
        token_dropout_id: the id that replaces it. The paper's models use 0; tokenizers of this package reserve 0.
        latent_dropout: dropout of the sampled latent while training.
        kl_weight: weight of the KL term of the loss.
        kl_clip: floor of each dimension's KL in nats.
    """

    model_type = "calm-lm-autoencoder"

    vocab_size: int = 128257
    patch_size: int = 4
    hidden_size: int = 512
    embedding_size: int | None = None
    intermediate_size: int = 1280
    latent_size: int = 128
    num_encoder_layers: int = 2
    num_decoder_layers: int = 2
    hidden_act: str = "silu"
    mlp_bias: bool = False
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    token_dropout: float | int = 0.15
    token_dropout_id: int = 0
    latent_dropout: float | int = 0.15
    kl_weight: float | int = 1e-3
    kl_clip: float | int = 0.5
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    tie_word_embeddings: bool = False  # one parameter serves as input and output embedding: there is nothing to tie

    def __post_init__(self, **kwargs: Any) -> None:
        register_models()
        kwargs.pop("model_type", None)  # of a checkpoint, perhaps the former one
        super().__post_init__(**kwargs)
        check_sizes(vars(self))
        if self.embedding_size is None:
            self.embedding_size = self.hidden_size
        for name in ("vocab_size", "patch_size", "hidden_size", "embedding_size", "intermediate_size", "latent_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        for name in ("num_encoder_layers", "num_decoder_layers"):
            layers = getattr(self, name)
            if layers < 2 or layers % 2:
                raise ValueError(
                    f"{name} must be an even number of at least 2, got {layers}: one half of the blocks works on "
                    "tokens, the other on patches."
                )
        for name in ("token_dropout", "latent_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must lie in [0, 1), got {getattr(self, name)}.")
        for name in ("kl_weight", "kl_clip"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}.")
        if not 0 <= self.token_dropout_id < self.vocab_size:
            raise ValueError(
                f"token_dropout_id must be a token id, 0 to {self.vocab_size - 1}, got {self.token_dropout_id}."
            )

    @classmethod
    def get_config_dict(cls, *args: Any, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        fields, others = super().get_config_dict(*args, **kwargs)
        if "model_type" in fields:
            fields["model_type"] = current_model_type(fields["model_type"])
        return fields, others


register_configuration(CalmAutoencoderConfig)
