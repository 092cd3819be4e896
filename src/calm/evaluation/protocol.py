"""What language models are scored on when they are compared: block size and stride, in tokens.

- *common*: all models on the same n-grams, with the same context in tokens.
- *paper*: as the paper scores each: blocks of 2048 positions of its backbone, an n-gram at every one of them.
"""

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

from calm.models.context import patch_size_of

PROTOCOLS = ("common", "paper")
BLOCK_SIZE = 1024  # in tokens, of the common protocol if none is given
_PAPER_POSITIONS = 2048


class Protocol(NamedTuple):
    """Blocks of so many tokens, an n-gram every so many; ``multiple_of`` is what block sizes must be a multiple of."""

    block_size: int
    stride: int
    multiple_of: int


def protocols(
    models: Iterable[Any], name: str = "common", block_size: int | None = None, stride: int | None = None
) -> list[Protocol]:
    """The protocol of every model of a comparison.

    Args:
        models: CALMs, token models and autoencoders.
        name: ``"common"`` or ``"paper"``; the latter sets block size and stride itself.
        block_size, stride: of the common protocol, in tokens; default 1024 and what fits the patches of all models.

    Raises:
        ValueError: for another name, and for settings the protocol does not take.
    """
    if name not in PROTOCOLS:
        raise ValueError(f"protocol must be one of {', '.join(PROTOCOLS)}, got {name!r}.")
    patch_sizes = [patch_size_of(model.config) for model in models]
    if name == "paper":
        if block_size is not None or stride is not None:
            raise ValueError("--protocol paper sets block size and stride itself: leave them out, or take common.")
        return [Protocol(_PAPER_POSITIONS * patch_size, patch_size, patch_size) for patch_size in patch_sizes]
    common = math.lcm(*patch_sizes)
    return [Protocol(block_size or BLOCK_SIZE, stride or common, common)] * len(patch_sizes)
