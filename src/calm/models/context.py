"""How long a text a model takes: positions of its backbone, one per patch of K tokens, K = 1 of a token model."""

from typing import Any


def patch_size_of(config: Any) -> int:
    """K; 1 of a token model."""
    return getattr(config, "patch_size", 1)


def context_of(config: Any) -> int | None:
    """Positions that the backbone of a CALM, or a token model, was made for; None where it has no limit."""
    return getattr(getattr(config, "backbone_config", config), "max_position_embeddings", None)


def positions_needed(prompt_tokens: int, new_tokens: int, patch_size: int = 1) -> int:
    """Positions that a prompt (at least a patch of it) and its continuation take; the last chunk is not fed back."""
    return max(1, _patches(prompt_tokens, patch_size)) + _patches(new_tokens, patch_size) - 1


def room_for_new(context: int, prompt_tokens: int, patch_size: int = 1) -> int:
    """New tokens that fit behind a prompt."""
    return max(0, (context - max(1, _patches(prompt_tokens, patch_size)) + 1) * patch_size)


def room_for_prompt(context: int, new_tokens: int, patch_size: int = 1) -> int:
    """Tokens of a prompt that leave room for its continuation."""
    return max(0, (context - _patches(new_tokens, patch_size) + 1) * patch_size)


def check_context(config: Any, text_tokens: int, patch_size: int = 1) -> None:
    """ValueError for a text longer than the model's context."""
    context, positions = context_of(config), _patches(text_tokens, patch_size)
    if context is not None and positions > context:
        raise ValueError(
            f"blocks of {text_tokens} tokens are {positions} positions, and the model's context holds {context}: take "
            f"blocks of at most {context * patch_size} tokens."
        )


def _patches(tokens: int, patch_size: int) -> int:
    return -(-tokens // patch_size)
