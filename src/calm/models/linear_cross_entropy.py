"""Cross-entropy of an output layer over a large vocabulary, without its logits.

Shapes: P positions, H hidden, V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

# Of the logits that exist at once: 256 MiB in float32; 1 GiB on a GPU, where every tile reads and sums the weight anew,
# and small ones would cost more than the products.
_TILE_ELEMENTS, _TILE_ELEMENTS_ELSEWHERE = 2**26, 2**28


def linear_cross_entropy(states: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """``cross_entropy(states @ weight.T, labels)``, the mean over labels that are not -100: scalar, in float32; 0
    where all are.

    The logits ``[P, V]``, by far the largest tensor of a training step, are computed piece by piece and not kept. In
    float32 torch does that (2.13 and later), in one pass less.

    Args:
        states: ``[P, H]``.
        weight: ``[V, H]``.
        labels: ``[P]``, -100 where a position does not count.
    """
    if len(labels) == 0:
        return states.sum().float()
    any_label = labels.ne(-100).any()
    # Without a label all count, times zero: a mean over nothing would be NaN, and so would its gradients be.
    labels = torch.where(any_label, labels, labels.clamp(min=0))
    return _mean(states, weight, labels) * any_label


def _mean(states: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    device = states.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else states.dtype
    # In half precision torch's sums over positions, and with them the loss, are half precision too.
    if dtype == torch.float32 and hasattr(torch.nn, "LinearCrossEntropyOptions"):
        return F.linear_cross_entropy(states, weight, labels, options=torch.nn.LinearCrossEntropyOptions())
    size = max(1, (_TILE_ELEMENTS if device == "cpu" else _TILE_ELEMENTS_ELSEWHERE) // len(weight))
    tiles = zip(states.split(size), labels.split(size), strict=True)
    sums = [
        checkpoint(_summed, tile, weight, of_tile, dtype, use_reentrant=False, preserve_rng_state=False)
        for tile, of_tile in tiles
    ]
    return torch.stack(sums).sum() / labels.ne(-100).sum()


def _summed(states: Tensor, weight: Tensor, labels: Tensor, dtype: torch.dtype) -> Tensor:
    # Here and not once for all tiles: the gradient of a float32 weight is then summed in float32.
    logits = F.linear(states.to(dtype), weight.to(dtype)).float()
    return F.cross_entropy(logits, labels, reduction="sum")
