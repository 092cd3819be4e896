"""Standard errors of BrierLM by bootstrap over the blocks of text it was measured on.

Shapes: n = 4 Brier scores.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from calm.functional.brier import brier_lm

_ROUNDS = 1000
# From fewer blocks no error is told, and from fewer none is believed that would end an evaluation.
_FEWEST, _FEWEST_TO_STOP = 8, 32


def resampled_means(brier: Tensor) -> Tensor | None:
    """Means of blocks drawn again with replacement: ``[blocks, n] -> [rounds, n]``; None for fewer than 8 blocks.

    The draws follow from the number of blocks alone: models scored on the same blocks are resampled alike.
    """
    if len(brier) < _FEWEST:
        return None
    generator = torch.Generator().manual_seed(0)
    rounds = [brier[torch.randint(len(brier), (len(brier),), generator=generator)].mean(0) for _ in range(_ROUNDS)]
    return torch.stack(rounds)


def error_to_stop_at(brier: Tensor) -> float:
    """Standard error of BrierLM, of blocks ``[blocks, n]``; infinite where they are too few to be believed.

    Where a Brier score is not above 0, so that BrierLM is 0, the greatest of theirs.
    """
    resampled = resampled_means(brier)
    if resampled is None or len(brier) < _FEWEST_TO_STOP:
        return math.inf
    if (brier.mean(0) > 0).all():
        return brier_lm(resampled).std().item()
    return 100 * resampled.std(0).max().item()


def brier_difference(
    blocks: Sequence[Sequence[float]], others: Sequence[Sequence[float]]
) -> tuple[float, float | None]:
    """BrierLM of one model less that of another on the same blocks, and its standard error.

    The error is None for fewer than 8 blocks, and where a Brier score is not above 0: BrierLM is 0 then, whatever the
    other scores say.

    A block that is hard for one model is hard for the other, so that the error of a difference is far smaller than
    those of the two scores.

    Args:
        blocks, others: ``block_brier`` of the two :class:`~calm.evaluation.brier_lm.BrierResult`.
    """
    first, second = (torch.tensor(each, dtype=torch.float64) / 100 for each in (blocks, others))
    if first.shape != second.shape:
        raise ValueError(f"brier_difference compares the same blocks, got {len(first)} and {len(second)} of them.")
    difference = (brier_lm(first.mean(0)) - brier_lm(second.mean(0))).item()
    ours, theirs = resampled_means(first), resampled_means(second)
    if ours is None or theirs is None or not (torch.stack([first, second]).mean(1) > 0).all():
        return difference, None
    return difference, (brier_lm(ours) - brier_lm(theirs)).std().item()
