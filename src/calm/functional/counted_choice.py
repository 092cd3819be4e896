"""The batch sampler for accelerators: all candidates are decoded, counted and chosen from without a host read.

:func:`~calm.functional.temperature.sample_batch` decodes only what a decision needs, which takes many decisions on the
host. An accelerator decodes a few thousand tokens faster than it answers one of them. The distribution is the same.

Shapes: R rows (contexts), N candidates of a row, K tokens of a patch.
"""

import math

import torch
from torch import Tensor

from calm.functional.rng import finest
from calm.functional.temperature import check_candidates, check_temperature

# Tokens that are decoded together at most. Above it the lazy sampler does less work than it waits.
AT_ONCE = 2**13


def choose_by_counts(candidates: Tensor, temperature: float, uniforms: Tensor) -> Tensor:
    """Choose one patch per row out of N independent samples, approximately with probability ~ P(x)^(1/T).

    A patch that occurs c >= 1/T times has the weight c! / (c - 1/T)!. Where no patch of a row occurs often enough, the
    exponent 1/T of that row is lowered by the smallest whole number that makes one eligible; at 1 and below, one of the
    samples is chosen with equal probabilities.

    Args:
        candidates: token ids, ``[R, N, K]``.
        temperature: in (0, 1].
        uniforms: random numbers in [0, 1), ``[R, 1]``.

    Returns:
        token ids, ``[R, K]``.
    """
    check_candidates(candidates.shape[1], temperature)
    exponent = check_temperature(temperature)
    same = (candidates[:, :, None] == candidates[:, None]).all(-1)  # [R, N, N]
    dtype = finest(candidates.device)
    copies = same.sum(-1).to(dtype)  # [R, N]
    lowered = (exponent - copies.amax(1, keepdim=True)).ceil().clamp(min=0)
    exponents = exponent - lowered  # [R, 1]
    # A patch is there c times, so each copy carries 1/c of its weight.
    log_weight = torch.lgamma(copies + 1) - torch.lgamma((copies - exponents + 1).clamp(min=1e-9)) - copies.log()
    log_weight = torch.where(exponents <= 1, torch.zeros_like(log_weight), log_weight)
    log_weight = log_weight.masked_fill((copies < exponents) & (exponents > 1), -math.inf)
    cumulative = (log_weight - log_weight.amax(1, keepdim=True)).exp().cumsum(1)
    place = torch.searchsorted(cumulative, uniforms.to(dtype) * cumulative[:, -1:], right=True)
    place = place.clamp(max=candidates.shape[1] - 1)[..., None].expand(-1, -1, candidates.shape[2])
    return candidates.gather(1, place)[:, 0]
