"""Computation in tiles where the whole result would be too large to hold, and the test for errors of memory."""

import torch

# 128 MiB in float32: on a GPU, starting many small kernels costs more than memory.
_ELSEWHERE = 2**25


def rows_at_once(width: int, device: torch.device, in_cache: int) -> int:
    """Return the number of rows of ``width`` elements in a tile: ``in_cache`` elements on a CPU, more elsewhere."""
    return max(1, (in_cache if device.type == "cpu" else _ELSEWHERE) // max(1, width))


def is_out_of_memory(error: Exception) -> bool:
    """Return whether an error of torch reports that memory did not suffice, on any device."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
