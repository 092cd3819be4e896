"""Steps whose results for a sequence do not depend on the sequences that run beside it, bit for bit.

Rounding depends on the batch for two reasons. The order of summation in a matrix product depends on the number of rows,
because kernels are chosen by shape. Attention sums over keys in blocks, and the keys are padded to the longest sequence
of the batch. While :class:`BatchInvariance` is active, products are computed in tiles of a fixed number of rows, and
attention is computed for one sequence at a time.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

_TILE_ROWS = 16
_MATMULS = {torch.matmul, Tensor.matmul, Tensor.__matmul__}


def check_batch_invariance(backbone_config: Any, name: str) -> None:
    """Raise ValueError for a backbone whose attention cannot be computed sequence by sequence here."""
    implementation = getattr(backbone_config, "_attn_implementation", None)
    if implementation != "sdpa":
        raise ValueError(
            f"--batch-invariant needs the attention implementation sdpa, and {name} has {implementation!r}: serve it "
            "without --batch-invariant."
        )


class BatchInvariance(TorchFunctionMode):
    """Context manager under which the rows of products and attention do not influence each other.

    Attributes:
        lengths: number of keys of every sequence in the next step; None while a prompt is read alone.
    """

    def __init__(self) -> None:
        super().__init__()
        self.lengths: Sequence[int] | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.linear:
            return _in_tiles(lambda rows: func(rows, *args[1:], **kwargs), args[0])
        if func in _MATMULS and args[0].dim() > 1:
            if args[1].dim() == 2:
                return _in_tiles(lambda rows: func(rows, args[1]), args[0])
            return _matrix_by_matrix(args[0], args[1])
        if func is F.scaled_dot_product_attention and self.lengths is not None:
            return self._attend(*args, **kwargs)
        return func(*args, **kwargs)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Any = None, **kwargs: Any) -> Tensor:
        """Attend from one position of every sequence to its own keys; the mask hides no others."""
        assert self.lengths is not None
        rows = [
            F.scaled_dot_product_attention(
                query[row : row + 1], key[row : row + 1, :, :length], value[row : row + 1, :, :length], **kwargs
            )
            for row, length in zip(range(len(query)), self.lengths, strict=True)
        ]
        return torch.cat(rows)


def _in_tiles(product: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Apply a product to tiles of ``_TILE_ROWS`` rows, the last one filled up: ``[..., I] -> [..., O]``."""
    rows = x.reshape(-1, x.shape[-1])
    count = len(rows)
    if count % _TILE_ROWS or count == 0:
        rows = F.pad(rows, (0, 0, 0, -count % _TILE_ROWS or _TILE_ROWS))
    result = torch.cat([product(tile) for tile in rows.split(_TILE_ROWS)])
    return result[:count].view(*x.shape[:-1], result.shape[-1])


def _matrix_by_matrix(first: Tensor, second: Tensor) -> Tensor:
    """Multiply matrices ``[..., M, D] @ [..., D, O]`` one at a time: a product of many takes other kernels."""
    leading = torch.broadcast_shapes(first.shape[:-2], second.shape[:-2])
    pairs = zip(
        first.expand(*leading, -1, -1).flatten(0, -3), second.expand(*leading, -1, -1).flatten(0, -3), strict=True
    )
    products = [torch.mm(left, right) for left, right in pairs]
    return torch.stack(products).view(*leading, first.shape[-2], second.shape[-1])
