"""Computation in tiles where the whole result would be too large to hold, and the test for errors of memory."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

# 128 MiB in float32: on a GPU, starting many small kernels costs more than memory.
_ELSEWHERE = 2**25

# Elements of the tensors (rows x vocabulary) that a training step holds at once: 256 MiB in float32. On a GPU 1 GiB:
# every tile reads the weight again and small tiles cost more than the products.
_TRAINING_ELEMENTS, _TRAINING_ELEMENTS_ELSEWHERE = 2**26, 2**28


def rows_at_once(width: int, device: torch.device, in_cache: int) -> int:
    """Return the number of rows of ``width`` elements in a tile: ``in_cache`` elements on a CPU, more elsewhere."""
    return max(1, (in_cache if device.type == "cpu" else _ELSEWHERE) // max(1, width))


def checkpointed_rows(function: Callable[..., Tensor], width: int, rows: tuple[Tensor, ...], *others: Tensor) -> Tensor:
    """Apply a function to tiles of rows and join the results; large intermediates exist for one tile at a time.

    Where one tile holds all rows the function is called directly. Otherwise the backward pass computes every tile
    again.

    Args:
        function: ``function(*rows_of_a_tile, *others)`` returns a tensor whose first dimension is joined: one result
            per row, or one per tile.
        width: elements that the function holds per row.
        rows: tensors with one entry per row, ``[P, ...]``.
        others: tensors that every tile needs.
    """
    elements = _TRAINING_ELEMENTS if rows[0].device.type == "cpu" else _TRAINING_ELEMENTS_ELSEWHERE
    size = max(1, elements // max(1, width))
    if len(rows[0]) <= size:
        return function(*rows, *others)
    tiles = zip(*(each.split(size) for each in rows), strict=True)
    return torch.cat(
        [checkpoint(function, *tile, *others, use_reentrant=False, preserve_rng_state=False) for tile in tiles]
    )


def is_out_of_memory(error: Exception) -> bool:
    """Return whether an error of torch reports that memory did not suffice, on any device."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
