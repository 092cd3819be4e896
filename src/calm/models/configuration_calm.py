"""Configuration of the language model: a composite of backbone, head and autoencoder."""

from typing import Any, ClassVar, Literal

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from calm.models.auto_classes import current_model_type, register_configuration, register_models
from calm.models.configuration_autoencoder import CalmAutoencoderConfig
from calm.models.configuration_codes import TokenCodesConfig
from calm.models.heads.registry import find_head, head_types
from calm.models.limits import check_sizes
from calm.utils.deprecation import RENAMED_CALM_FIELDS, rename_deprecated

# Weights of the auxiliary losses, and all fields of theirs.
AUXILIARY_WEIGHTS = ("mtp_weight", "decoded_brier_weight")
AUXILIARY = (*AUXILIARY_WEIGHTS, "mtp_type")


@strict
class CalmConfig(PreTrainedConfig):
    r"""
    A continuous autoregressive language model. The defaults are CALM-M of the paper.

    Args:
        backbone_config: any decoder-only transformers configuration (default Llama), as an object or a dict.
        autoencoder_config: [`CalmAutoencoderConfig`], or [`TokenCodesConfig`] for a categorical flow head, or a dict of
            the fields of either with its ``model_type``; it fixes the patch size and vocabulary.
        head_config: a head configuration or a dict of its fields; its ``type`` is the name of a registered head.
        document_separator_id: token between the documents of the training text, and before prompts; default the
            end-of-text token. The models of the paper have the begin-of-text token instead.
        mtp_weight: weight of an auxiliary loss, the cross-entropy of multi-token prediction from the hidden states.
            Default 0, as in the paper; above 0 the model has an MTP head, which ``sampler="mtp"`` generates with. With
            small budgets the loss teaches the backbone to use its context.
        mtp_type: ``"independent"`` predicts every token by itself, ``"autoregressive"`` also from the tokens before it
            in its patch.
        decoded_brier_weight: weight of the decoded-token Brier loss, the Brier score of the tokens that the samples of
            the head decode to. It needs a head whose loss returns samples (energy). Default 0, as in the paper; 20 is
            a good value for fine-tuning the head of a small model.
    """

    model_type = "calm-lm"
    attribute_map: ClassVar = RENAMED_CALM_FIELDS  # reading a former name gives the field
    sub_configs: ClassVar = {"backbone_config": AutoConfig, "autoencoder_config": CalmAutoencoderConfig}

    # Dicts and None become configurations when the object is made.
    backbone_config: Any = None
    autoencoder_config: Any = None
    head_config: Any = None
    document_separator_id: int | None = None
    mtp_weight: float | int = 0.0
    mtp_type: Literal["independent", "autoregressive"] = "independent"
    decoded_brier_weight: float | int = 0.0
    initializer_range: float = 0.02
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        register_models()
        kwargs.pop("model_type", None)  # of a checkpoint, perhaps the former one
        rename_deprecated(kwargs, RENAMED_CALM_FIELDS, "CalmConfig")
        for name in RENAMED_CALM_FIELDS.values():
            if name in kwargs:
                setattr(self, name, kwargs.pop(name))
        patch_size = kwargs.pop("patch_size", None)
        for name in ("vocab_size", "hidden_size"):
            if name in kwargs:
                raise ValueError(f"{name} is a field of backbone_config and autoencoder_config, not of CalmConfig.")
        if not isinstance(self.autoencoder_config, PreTrainedConfig):
            self.autoencoder_config = _autoencoder_config(self.autoencoder_config or {})
        if not isinstance(self.backbone_config, PreTrainedConfig):
            fields = dict(self.backbone_config) if self.backbone_config else _calm_m_backbone()
            fields.setdefault("vocab_size", self.autoencoder_config.vocab_size)
            check_sizes(fields, "backbone_config.")
            model_type = fields.pop("model_type", "llama")
            if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
                raise ValueError(
                    f"backbone_config.model_type must be one that transformers has, such as llama, got {model_type!r}."
                )
            self.backbone_config = AutoConfig.for_model(model_type, **fields)
        if not isinstance(self.head_config, PreTrainedConfig):
            fields = dict(self.head_config or {})
            head = find_head(fields.setdefault("type", "energy"))
            fields.pop("model_type", None)
            check_sizes(fields, "head_config.")
            self.head_config = head.config_class(**fields)
        self._check_head_fits()
        super().__post_init__(**kwargs)

        _check_looks_back_only(self.backbone_config)
        for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
            if getattr(self, name) is None:
                setattr(self, name, getattr(self.autoencoder_config, name))
        self.check_loss_weights()
        if patch_size is not None and patch_size != self.patch_size:
            raise ValueError(
                f"patch_size is {patch_size}, but the autoencoder was built for {self.patch_size} tokens per patch."
            )
        if self.backbone_config.vocab_size != self.autoencoder_config.vocab_size:
            raise ValueError(
                f"backbone_config.vocab_size ({self.backbone_config.vocab_size}) and autoencoder_config.vocab_size "
                f"({self.autoencoder_config.vocab_size}) must be equal: both have the same tokens."
            )
        self._check_token_ids()

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Build a configuration from the fields of a ``config.json``, also from one with former names."""
        fields = dict(config_dict)
        rename_deprecated(fields, RENAMED_CALM_FIELDS, "config.json", warn=False)
        return super().from_dict(fields, **kwargs)

    def _check_head_fits(self) -> None:
        """Raise ValueError when the head cannot be used with the autoencoder; set the fields that follow from it."""
        head, autoencoder = self.head_config, self.autoencoder_config
        needs_codes = find_head(head.type).needs_token_codes
        if needs_codes != (autoencoder.model_type == TokenCodesConfig.model_type):
            raise ValueError(
                f"head_config.type {head.type!r} does not fit the autoencoder ({autoencoder.model_type}): a "
                "categorical_flow head needs token codes (in a recipe, model.autoencoder: {type: codes, patch_size: 4, "
                "code_size: 32}), and other heads need a trained autoencoder."
            )
        head.fit_to(autoencoder)

    @classmethod
    def get_config_dict(cls, *args: Any, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        fields, others = super().get_config_dict(*args, **kwargs)
        if "model_type" in fields:
            fields["model_type"] = current_model_type(fields["model_type"])
        return fields, others

    def check_loss_weights(self) -> None:
        """Raise ValueError when the weight of an auxiliary loss does not fit."""
        for name in AUXILIARY_WEIGHTS:
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}.")
        if self.decoded_brier_weight and not find_head(self.head_config.type).returns_samples:
            with_samples = [name for name in head_types() if find_head(name).returns_samples]
            raise ValueError(
                f"decoded_brier_weight needs a head whose loss returns samples ({', '.join(with_samples)}); the type "
                f"in head_config is {self.head_config.type!r}."
            )

    @property
    def patch_size(self) -> int:
        """Return K, the tokens per latent vector, of the autoencoder."""
        return self.autoencoder_config.patch_size

    def _check_token_ids(self) -> None:
        """Raise ValueError when the token that begins a text is not in the vocabulary: it is embedded."""
        if not 0 <= self.separator_id < self.vocab_size:
            raise ValueError(
                f"the document separator (document_separator_id, else eos_token_id, else bos_token_id) is "
                f"{self.separator_id}, and the vocabulary has the ids 0 to {self.vocab_size - 1}."
            )

    @property
    def separator_id(self) -> int:
        """Return the token between documents."""
        eos = self.eos_token_id[0] if isinstance(self.eos_token_id, list) else self.eos_token_id
        known = (token for token in (self.document_separator_id, eos, self.bos_token_id) if token is not None)
        return next(known, 0)

    @property
    def vocab_size(self) -> int:
        return self.autoencoder_config.vocab_size

    @property
    def hidden_size(self) -> int:
        """Return D, the width of the backbone."""
        return self.backbone_config.hidden_size

    def to_dict(self) -> dict:
        """Return all fields, with the sub-configurations and (for readers of config.json) the patch size."""
        return super().to_dict() | {"head_config": self.head_config.to_dict(), "patch_size": self.patch_size}


def _autoencoder_config(fields: dict[str, Any]) -> PreTrainedConfig:
    fields = dict(fields)
    is_codes = fields.pop("model_type", None) == TokenCodesConfig.model_type
    return TokenCodesConfig(**fields) if is_codes else CalmAutoencoderConfig(**fields)


def _check_looks_back_only(backbone: PreTrainedConfig) -> None:
    """Raise ValueError for a backbone that is not causal or not a decoder of text alone."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    kind = backbone.model_type
    if (text := backbone.get_text_config()) is not backbone:
        raise ValueError(
            f"backbone_config: a {kind} has inputs beside text; use its text model, model_type {text.model_type!r}."
        )
    if backbone.is_encoder_decoder:
        raise ValueError(f"backbone_config must be of a decoder-only model such as llama, got model_type {kind!r}.")
    if kind in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(backbone, "is_decoder", False):
        raise ValueError(
            f"backbone_config: a {kind} is an encoder, which would see what it has to predict, unless it has "
            "is_decoder: true."
        )


def _calm_m_backbone() -> dict:
    from transformers import LlamaConfig

    return LlamaConfig(
        hidden_size=1024,
        intermediate_size=2752,
        num_hidden_layers=16,
        num_attention_heads=16,
        max_position_embeddings=2048,
        rms_norm_eps=1e-6,
    ).to_diff_dict() | {"vocab_size": 128257}


register_configuration(CalmConfig)
