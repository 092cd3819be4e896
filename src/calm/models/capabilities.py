"""Checks that a model supports what scores and serving do with its hidden states and its key/value cache."""

from typing import Any

# Fields of token models that change their logits.
_LOGITS = ("final_logit_softcapping", "logits_scaling", "logit_scale")


def check_plain_logits(config: Any, purpose: str) -> None:
    """Raise ValueError for a token model whose logits are more than a product with its output embedding."""
    for name in _LOGITS:
        if getattr(config, name, None) not in (None, 1, 1.0, False):
            raise ValueError(f"a {config.model_type} model with {name} cannot be {purpose}: only plain logits.")


def check_full_attention(config: Any, purpose: str) -> None:
    """Raise ValueError for a backbone with layers that do not attend to all positions, or that ignore a mask."""
    other = set(getattr(config, "layer_types", None) or []) - {"full_attention"}
    if other or getattr(config, "sliding_window", None):
        kinds = ", ".join(sorted(other)) or "sliding_window"
        raise ValueError(
            f"a {config.model_type} backbone with {kinds} cannot be {purpose}: only full attention (in a recipe, "
            "model.backbone's layer_types all full_attention, its sliding_window null)."
        )
    if "flash" in (config._attn_implementation or ""):
        raise ValueError(
            f"a model with attn_implementation={config._attn_implementation} cannot be {purpose}: flash attention "
            'ignores custom masks. Load it with attn_implementation="sdpa".'
        )
