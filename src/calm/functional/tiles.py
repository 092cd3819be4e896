"""How much of a tensor exists at once where the whole would be too large, and whether it was."""

import torch

# 128 MiB in float32: starting many small kernels would cost a GPU more than memory does.
_ELSEWHERE = 2**25


def rows_at_once(width: int, device: torch.device, in_cache: int) -> int:
    """Rows of so many elements that a tile holds: what caches hold on a CPU (``in_cache`` elements), more elsewhere."""
    return max(1, (in_cache if device.type == "cpu" else _ELSEWHERE) // max(1, width))


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error of torch says that memory did not suffice, on whichever device."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
