"""The most likely token of a decoder state: the largest of its products with the whole vocabulary.

Low-temperature sampling computes it for hundreds of samples at every step.

Shapes: P states, H hidden, V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from calm.functional.tiles import rows_at_once

# Tiles of logits fit the cache of a CPU, with a lower bound on their rows: every tile reads all weights.
_TILE_ELEMENTS, _TILE_ROWS = 2**21, 128
_BLOCK = 128


def best_token(states: Tensor, weight: Tensor) -> Tensor:
    """Compute ``argmax(states @ weight.T)``: ``[P, H], [V, H] -> [P]``."""
    tiles = states.split(max(_TILE_ROWS, rows_at_once(len(weight), states.device, _TILE_ELEMENTS)))
    return torch.cat([_argmax(F.linear(tile, weight)) for tile in tiles])


def _argmax(logits: Tensor) -> Tensor:
    """Compute ``argmax(-1)`` of ``[P, V]``. On a CPU, a maximum is several times faster than its index."""
    vocab_size = logits.shape[1]
    if logits.device.type != "cpu" or vocab_size < 2 * _BLOCK:
        return logits.argmax(-1)
    whole = vocab_size // _BLOCK * _BLOCK
    highest = logits[:, :whole].unflatten(1, (-1, _BLOCK)).amax(-1)
    if whole < vocab_size:
        highest = torch.cat([highest, logits[:, whole:].amax(-1, keepdim=True)], dim=1)
    block = highest.argmax(1, keepdim=True)
    places = (block * _BLOCK + torch.arange(_BLOCK, device=logits.device)).clamp(max=vocab_size - 1)
    return places.gather(1, logits.gather(1, places).argmax(1, keepdim=True))[:, 0]
