"""Configuration of a drafter."""

from typing import Any

from transformers import PreTrainedConfig

DRAFTER_TYPES = ("mtp", "categorical_flow", "eagle")


class DrafterConfig(PreTrainedConfig):
    """Configuration of a drafter: a small model that proposes the next tokens of a token model, its target.

    Args:
        drafter_type: ``"mtp"`` (tokens one after the other through a small recurrence), ``"categorical_flow"`` (all
            tokens in a few passes) or ``"eagle"`` (one decoder layer over the whole text; Li et al. 2025,
            arXiv 2503.01840).
        num_tokens: tokens of a draft at most, G.
        hidden_size: hidden size of the target.
        feature_layers: indices into the ``hidden_states`` of the target that are concatenated to features.
        num_mlp_layers: residual blocks of the trunk (and of the flow's network).
        num_attention_heads: of the decoder layer of ``"eagle"``.
        shortlist_size: tokens that a draft may consist of; the others are never drafted.
        target_hash: identifies the configuration of the target, as
            :func:`~calm.models.drafters.base.target_hash` computes it.
    """

    model_type = "calm-drafter"

    def __init__(
        self,
        drafter_type: str = "mtp",
        num_tokens: int = 4,
        hidden_size: int = 576,
        feature_layers: tuple[int, ...] = (-1,),
        num_mlp_layers: int = 2,
        num_attention_heads: int = 8,
        shortlist_size: int = 4096,
        layer_norm_eps: float = 1e-6,
        target_hash: str = "",
        **kwargs: Any,
    ):
        if drafter_type not in DRAFTER_TYPES:
            raise ValueError(f"drafter_type must be one of {', '.join(DRAFTER_TYPES)}, got {drafter_type!r}.")
        sizes = {"num_tokens": num_tokens, "hidden_size": hidden_size, "shortlist_size": shortlist_size}
        for name, size in sizes.items():
            if type(size) is not int or size < 1:
                raise ValueError(f"{name} of a drafter must be a whole number of at least 1, got {size!r}.")
        if not feature_layers:
            raise ValueError("feature_layers of a drafter must name at least one layer of the target, such as [-1].")
        self.drafter_type, self.num_tokens, self.hidden_size = drafter_type, num_tokens, hidden_size
        self.feature_layers, self.num_mlp_layers = tuple(feature_layers), num_mlp_layers
        self.num_attention_heads, self.shortlist_size = num_attention_heads, shortlist_size
        self.layer_norm_eps, self.target_hash = layer_norm_eps, target_hash
        super().__init__(**kwargs)
