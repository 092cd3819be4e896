"""Cross-entropy of an output layer over a large vocabulary, without its logits.

Shapes: P positions, H hidden, V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def linear_cross_entropy(states: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """``cross_entropy(states @ weight.T, labels)``, the mean over labels that are not -100: scalar, in float32.

    The logits ``[P, V]``, by far the largest tensor of a training step, are computed piece by piece and not kept, where
    torch can do that (2.13 and later).

    Args:
        states: ``[P, H]``.
        weight: ``[V, H]``.
        labels: ``[P]``, -100 where a position does not count.
    """
    if torch.is_autocast_enabled(states.device.type):
        dtype = torch.get_autocast_dtype(states.device.type)
        states, weight = states.to(dtype), weight.to(dtype)
    if hasattr(F, "linear_cross_entropy"):
        return F.linear_cross_entropy(states, weight, labels, options=torch.nn.LinearCrossEntropyOptions()).float()
    return F.cross_entropy(F.linear(states, weight).float(), labels)
