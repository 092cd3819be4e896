"""Bounds of the sizes in a configuration, checked before a configuration object or a model is built.

Some configurations build a list with one entry per layer, which would not end for a billion layers.
"""

import re
from collections.abc import Iterator
from typing import Any

MAX_LAYERS = 4096
MAX_SIZE = 2**24
_LAYERS = re.compile(r"(.*_)?layers?")
_SIZES = re.compile(r"(.*_)?(size|dim|heads?|experts|embd|inner)")
_AT_LEAST_ONE = {
    "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size",
    "max_position_embeddings", "n_embd", "n_layer", "n_head",
}  # fmt: skip


def check_sizes(fields: dict[str, Any], prefix: str = "") -> None:
    """Raise ValueError for a number of layers or a size in a configuration that is out of bounds.

    Args:
        fields: fields of a configuration, as in its ``config.json``; nested configurations are checked too.
        prefix: prefix of the names of the fields in the message.
    """
    for name, value in leaves(fields):
        if not isinstance(value, int | float) or isinstance(value, bool):
            continue
        field = name.rpartition(".")[2]
        if field in _AT_LEAST_ONE and value < 1:
            raise ValueError(f"{prefix}{name} must be at least 1, got {value}.")
        limit = MAX_LAYERS if _LAYERS.fullmatch(field) else MAX_SIZE if _SIZES.fullmatch(field) else None
        if limit is not None and not value <= limit:
            raise ValueError(f"{prefix}{name} must be at most {limit:,}, got {value:,}.")


def leaves(fields: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield dotted names and values of all fields of nested dicts."""
    waiting = [("", fields)]
    while waiting:
        prefix, part = waiting.pop()
        for name, value in part.items():
            if isinstance(value, dict):
                waiting.append((f"{prefix}{name}.", value))
            else:
                yield f"{prefix}{name}", value
