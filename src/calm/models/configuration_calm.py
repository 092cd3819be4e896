"""Configuration of the language model: a composite of backbone, head and autoencoder."""

from typing import Any, ClassVar, Literal

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, LlamaConfig, PreTrainedConfig

from calm.models.configuration_autoencoder import CalmAutoencoderConfig


@strict
class EnergyHeadConfig(PreTrainedConfig):
    r"""
    The head that maps uniform noise and a hidden state to a latent vector, trained by the energy score.

    Args:
        type: ``"energy"``.
        num_mlp_layers: residual blocks. The paper takes a quarter of the backbone's layers.
        noise_size: entries of the uniform noise.
        num_samples: N, draws of the head per position in the loss.
        num_target_samples: M, draws of the true patch's posterior per position in the loss.
        alpha: exponent of the energy score, in (0, 2).
        mean_pull_weight: weight of a squared-error pull of the samples' mean towards the posterior's; 0 in the paper.
        condition_residual: whether the hidden state also enters the residual stream, beside the noise. In the paper it
            acts through the gates of the blocks alone, which start out almost closed: small models on small budgets
            then hardly learn to look at their context.
    """

    model_type = "calm_energy_head"
    base_config_key = "head_config"

    type: Literal["energy"] = "energy"
    num_mlp_layers: int = 4
    noise_size: int = 64
    num_samples: int = 8
    num_target_samples: int = 100
    alpha: float = 1.0
    mean_pull_weight: float = 0.0
    condition_residual: bool = False
    layer_norm_eps: float = 1e-6

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        if self.num_samples < 2:
            raise ValueError(
                f"head_config.num_samples must be at least 2 (the score compares pairs), got {self.num_samples}."
            )
        if self.num_target_samples < 1 or self.noise_size < 1 or self.num_mlp_layers < 1:
            raise ValueError("head_config: num_target_samples, noise_size and num_mlp_layers must be at least 1.")
        if not 0 < self.alpha < 2:
            raise ValueError(f"head_config.alpha must lie in (0, 2), got {self.alpha}.")


HEAD_CONFIGS: dict[str, type[PreTrainedConfig]] = {"energy": EnergyHeadConfig}


@strict
class CalmConfig(PreTrainedConfig):
    r"""
    A continuous autoregressive language model. The defaults are CALM-M of the paper.

    Args:
        backbone_config: any decoder-only transformers configuration (default Llama), as an object or a dict.
        autoencoder_config: [`CalmAutoencoderConfig`] or a dict of its fields; it fixes the patch size and vocabulary.
        head_config: a head configuration or a dict of its fields; ``type`` says which.
    """

    model_type = "calm"
    sub_configs: ClassVar = {"backbone_config": AutoConfig, "autoencoder_config": CalmAutoencoderConfig}

    # Dicts and None become configurations when the object is made.
    backbone_config: Any = None
    autoencoder_config: Any = None
    head_config: Any = None
    initializer_range: float = 0.02
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs):
        patch_size = kwargs.pop("patch_size", None)
        if not isinstance(self.autoencoder_config, PreTrainedConfig):
            self.autoencoder_config = CalmAutoencoderConfig(**(self.autoencoder_config or {}))
        if not isinstance(self.backbone_config, PreTrainedConfig):
            fields = dict(self.backbone_config) if self.backbone_config else _calm_m_backbone()
            fields.setdefault("vocab_size", self.autoencoder_config.vocab_size)
            self.backbone_config = AutoConfig.for_model(fields.pop("model_type", "llama"), **fields)
        if not isinstance(self.head_config, PreTrainedConfig):
            fields = dict(self.head_config or {})
            head_type = fields.setdefault("type", "energy")
            if head_type not in HEAD_CONFIGS:
                raise ValueError(f"head_config.type must be one of {', '.join(HEAD_CONFIGS)}, got {head_type!r}.")
            fields.pop("model_type", None)
            self.head_config = HEAD_CONFIGS[head_type](**fields)
        super().__post_init__(**kwargs)

        for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
            if getattr(self, name) is None:
                setattr(self, name, getattr(self.autoencoder_config, name))
        if patch_size is not None and patch_size != self.patch_size:
            raise ValueError(
                f"patch_size is {patch_size}, but the autoencoder was built for {self.patch_size} tokens per patch."
            )
        if self.backbone_config.vocab_size != self.autoencoder_config.vocab_size:
            raise ValueError(
                f"backbone_config.vocab_size ({self.backbone_config.vocab_size}) and autoencoder_config.vocab_size "
                f"({self.autoencoder_config.vocab_size}) must be equal: both read the same tokens."
            )

    @property
    def patch_size(self) -> int:
        """K, tokens per latent vector; the autoencoder's."""
        return self.autoencoder_config.patch_size

    @property
    def vocab_size(self) -> int:
        return self.autoencoder_config.vocab_size

    @property
    def hidden_size(self) -> int:
        """D, width of the backbone."""
        return self.backbone_config.hidden_size

    def to_dict(self) -> dict:
        """All fields, with the sub-configurations and (for readers of config.json) the patch size."""
        return super().to_dict() | {"head_config": self.head_config.to_dict(), "patch_size": self.patch_size}


def _calm_m_backbone() -> dict:
    return LlamaConfig(
        hidden_size=1024,
        intermediate_size=2752,
        num_hidden_layers=16,
        num_attention_heads=16,
        max_position_embeddings=2048,
        rms_norm_eps=1e-6,
    ).to_diff_dict() | {"vocab_size": 128257}
