"""Cross-entropy of an output layer over a large vocabulary, without holding its logits.

Shapes: P positions, H hidden, V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from calm.functional.tiles import checkpointed_rows


def linear_cross_entropy(states: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Compute ``cross_entropy(states @ weight.T, labels)``, the mean over the labels that are not -100.

    The logits ``[P, V]``, the largest tensor of a training step, are computed in tiles and not kept. In float32 torch
    has a function for it (2.13 and later), with one pass less.

    Args:
        states: ``[P, H]``.
        weight: ``[V, H]``.
        labels: ``[P]``, -100 where a position does not count.

    Returns:
        scalar in float32; 0 when all labels are -100.
    """
    if len(labels) == 0:
        return states.sum().float()
    any_label = labels.ne(-100).any()
    # Without a label all positions count, multiplied by zero: a mean over nothing, and its gradient, would be NaN.
    labels = torch.where(any_label, labels, labels.clamp(min=0))
    return _mean(states, weight, labels) * any_label


def _mean(states: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    device = states.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else states.dtype
    # In half precision torch would sum over positions, and return the loss, in half precision.
    if dtype == torch.float32 and hasattr(torch.nn, "LinearCrossEntropyOptions"):
        return F.linear_cross_entropy(states, weight, labels, options=torch.nn.LinearCrossEntropyOptions())

    def summed(states: Tensor, labels: Tensor, weight: Tensor) -> Tensor:
        # The weight is cast in every tile, so that its gradient is summed in float32.
        logits = F.linear(states.to(dtype), weight.to(dtype)).float()
        return F.cross_entropy(logits, labels, reduction="sum")[None]

    return checkpointed_rows(summed, len(weight), (states, labels), weight).sum() / labels.ne(-100).sum()
