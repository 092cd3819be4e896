"""The context of a model in positions of its backbone, one per patch of K tokens; K = 1 for token models."""

from typing import Any


def patch_size_of(config: Any) -> int:
    """Return K, the tokens per patch; 1 for a token model."""
    return getattr(config, "patch_size", 1)


def context_of(config: Any) -> int | None:
    """Return the positions that the backbone of a CALM, or a token model, supports; None if there is no limit."""
    return getattr(getattr(config, "backbone_config", config), "max_position_embeddings", None)


def positions_needed(prompt_tokens: int, new_tokens: int, patch_size: int = 1) -> int:
    """Return the positions of a prompt (at least one) and its continuation, whose last patch is not fed back."""
    return max(1, _patches(prompt_tokens, patch_size)) + _patches(new_tokens, patch_size) - 1


def room_for_new(context: int, prompt_tokens: int, patch_size: int = 1) -> int:
    """Return the number of new tokens that fit after a prompt."""
    return max(0, (context - max(1, _patches(prompt_tokens, patch_size)) + 1) * patch_size)


def room_for_prompt(context: int, new_tokens: int, patch_size: int = 1) -> int:
    """Return the number of tokens of a prompt that fit before a continuation."""
    return max(0, (context - _patches(new_tokens, patch_size) + 1) * patch_size)


def check_context(config: Any, text_tokens: int, patch_size: int = 1) -> None:
    """Raise ValueError for a text longer than the context of the model."""
    context, positions = context_of(config), _patches(text_tokens, patch_size)
    if context is not None and positions > context:
        raise ValueError(
            f"blocks of {text_tokens} tokens are {positions} positions, and the model's context has {context}: use "
            f"blocks of at most {context * patch_size} tokens."
        )


def _patches(tokens: int, patch_size: int) -> int:
    return -(-tokens // patch_size)
