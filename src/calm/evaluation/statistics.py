"""Standard errors of BrierLM, over documents where they are known and over runs of neighbouring blocks elsewhere.

Blocks of one document are not independent, and few blocks give an error that is too small on average.
``tests/evaluation/test_statistics.py`` measures how often an interval of one error around the score holds the true
value; 68% are due.

Over documents: a jackknife. The score is computed without each document in turn, and the squared deviations are summed.
The error is multiplied by the quantile of Student's t distribution with Satterthwaite's number of degrees of freedom,
(sum of w)^2 / sum of w^2 for squared deviations w, which is small where few documents decide the score.

Over runs: a bootstrap in three steps.

1. Whole runs of neighbouring blocks are resampled. A run begins with 4 blocks and doubles as long as the means of
   neighbouring runs are positively correlated.
2. The variance is divided by 1 - 1/r for r runs, because a bootstrap sample is centred at the mean of the sample.
3. The error is multiplied by the quantile of Student's t distribution with r - 1 degrees of freedom, so that one error
   covers 68% as it does for a normal distribution.

Shapes: n = 4 Brier scores, r runs, D documents.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from calm.functional.brier import brier_lm

# No error is reported for fewer blocks, and no evaluation ends early with fewer.
MIN_BLOCKS = 32
_ROUNDS = 1000
_ROUNDS_TILE = 2**20  # (rounds x runs) at once
_BLOCKS_PER_RUN, _MIN_RUNS = 4, 4


def brier_errors(brier: Tensor, documents: Sequence[int] | None = None) -> tuple[float, list[float]] | None:
    """Standard errors of BrierLM and of each Brier score; None for fewer than ``MIN_BLOCKS`` blocks.

    Args:
        brier: Brier scores of blocks in the order of the text ``[blocks, n]``.
        documents: number of the document of each block; None where documents are unknown.
    """
    if len(brier) < MIN_BLOCKS:
        return None
    return _standard_error(brier_lm, [brier], documents).item(), _standard_error(_same, [brier], documents).tolist()


def error_to_stop_at(brier: Tensor, documents: Sequence[int] | None = None) -> float:
    """Standard error of BrierLM that an evaluation compares with its target; infinite below ``MIN_BLOCKS`` blocks.

    It is the greater of the error of :func:`brier_errors` and that over single blocks: an estimate that is small by
    chance would otherwise end the evaluation. Where BrierLM is 0, because a Brier score is not above 0, it is the
    greatest error of the Brier scores, times 100.

    Args:
        brier, documents: as :func:`brier_errors` takes them.
    """
    if len(brier) < MIN_BLOCKS:
        return math.inf
    is_positive = bool((brier.mean(0) > 0).all())
    score = brier_lm if is_positive else _percent
    over_blocks = _bootstrap_error(score, [brier], len(brier))
    return max(_standard_error(score, [brier], documents).max().item(), over_blocks.max().item())


def brier_difference(
    blocks: Sequence[Sequence[float]], others: Sequence[Sequence[float]], documents: Sequence[int] | None = None
) -> tuple[float, float | None]:
    """Return BrierLM of one model minus that of another on the same blocks, and the standard error of the difference.

    The error is None for fewer than ``MIN_BLOCKS`` blocks, and where a Brier score is not above 0: BrierLM is 0 then,
    whatever the other scores are.

    A block that is hard for one model is hard for the other, so that the error of a difference is far smaller than
    those of the two scores.

    Args:
        blocks, others: ``block_brier`` of the two :class:`~calm.evaluation.brier_lm.BrierResult`, in the order of the
            text.
        documents: ``block_documents`` of either.
    """
    first, second = (torch.tensor(scores, dtype=torch.float64) / 100 for scores in (blocks, others))
    if first.shape != second.shape:
        raise ValueError(f"brier_difference compares the same blocks, got {len(first)} and {len(second)} of them.")
    difference = (brier_lm(first.mean(0)) - brier_lm(second.mean(0))).item()
    if len(first) < MIN_BLOCKS or not (torch.stack([first, second]).mean(1) > 0).all():
        return difference, None
    error = _standard_error(lambda ours, theirs: brier_lm(ours) - brier_lm(theirs), [first, second], documents)
    return difference, error.item()


def _same(means: Tensor) -> Tensor:
    return means


def _percent(means: Tensor) -> Tensor:
    return 100 * means


def _standard_error(score: Callable[..., Tensor], models: Sequence[Tensor], documents: Sequence[int] | None) -> Tensor:
    """Standard error of a score: over documents where there are at least two, else over runs of blocks.

    Args:
        score: function of the mean Brier scores of every model, ``[..., n] -> [...]``.
        models: Brier scores of one model, or of two that are compared, ``[blocks, n]`` each.
    """
    if documents is not None and len(set(documents)) > 1:
        return _jackknife_error(score, models, documents)
    return _bootstrap_error(score, models, _num_runs(models[0] - models[1] if len(models) > 1 else models[0]))


def _jackknife_error(score: Callable[..., Tensor], models: Sequence[Tensor], documents: Sequence[int]) -> Tensor:
    number = torch.tensor(documents).unique(return_inverse=True)[1]
    sizes = torch.bincount(number)[:, None].to(models[0])  # [D, 1]
    without = [
        (brier.sum(0) - brier.new_zeros(len(sizes), brier.shape[1]).index_add_(0, number, brier)) / (len(brier) - sizes)
        for brier in models
    ]
    squares = (score(*without) - score(*(brier.mean(0) for brier in models))).square()  # [D, ...]
    total = squares.sum(0)
    degrees = (total.square() / squares.square().sum(0).clamp(min=torch.finfo(total.dtype).tiny)).clamp(min=1)
    return (total * (len(sizes) - 1) / len(sizes)).sqrt() * _student_factor(degrees)


def _bootstrap_error(score: Callable[..., Tensor], models: Sequence[Tensor], num_runs: int) -> Tensor:
    return _error(score(*(_resampled_means(brier, num_runs) for brier in models)), num_runs)


def _run_sums(values: Tensor, num_runs: int) -> tuple[Tensor, Tensor]:
    """Sum of each run of neighbouring blocks ``[blocks, n] -> [r, n]``, and the number of its blocks ``[r, 1]``."""
    ends = torch.arange(1, num_runs + 1) * len(values) // num_runs
    sizes = ends.diff(prepend=ends.new_zeros(1))[:, None]
    return values.cumsum(0)[ends - 1].diff(dim=0, prepend=values.new_zeros(1, values.shape[1])), sizes.to(values)


def _num_runs(values: Tensor) -> int:
    """Number of runs that count as independent, for blocks ``[blocks, n]``."""
    num_runs = len(values) // _BLOCKS_PER_RUN
    deviations = values - values.mean(0)
    while num_runs // 2 >= _MIN_RUNS:
        sums, _ = _run_sums(deviations, num_runs)
        variance = sums.square().sum(0).clamp(min=torch.finfo(sums.dtype).tiny)
        if ((sums[1:] * sums[:-1]).sum(0) / variance).mean() <= 0:
            break
        num_runs //= 2
    return num_runs


def _resampled_means(values: Tensor, num_runs: int) -> Tensor:
    """Means of runs sampled with replacement: ``[blocks, n] -> [rounds, n]``.

    The samples depend on the number of runs alone: models scored on the same blocks are resampled alike.
    """
    sums, sizes = _run_sums(values, num_runs)
    generator = torch.Generator().manual_seed(0)
    rounds = max(1, _ROUNDS_TILE // num_runs)
    means = []
    for first in range(0, _ROUNDS, rounds):
        shape = (min(rounds, _ROUNDS - first), num_runs)
        chosen = torch.randint(num_runs, shape, generator=generator)
        counts = values.new_zeros(shape).scatter_add_(1, chosen, values.new_ones(shape))
        means.append((counts @ sums) / (counts @ sizes))
    return torch.cat(means)


def _error(resampled: Tensor, num_runs: int) -> Tensor:
    """Standard error from resampled scores ``[rounds, ...]``, corrected for the number of runs: ``[...]``."""
    return resampled.std(0) * math.sqrt(num_runs / (num_runs - 1)) * _student_factor(num_runs - 1)


def _student_factor(degrees: Any) -> Any:
    """Half-width of the interval that covers as much of Student's t distribution as +-1 covers of a normal one.

    The Cornish-Fisher expansion at 1 standard deviation; its error is below 0.0002 from 3 degrees of freedom on, and
    0.03 at 1. Takes numbers and tensors.
    """
    return 1 + 1 / (2 * degrees) + 1 / (4 * degrees**2) + 1 / (16 * degrees**3)
