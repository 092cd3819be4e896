"""Flow matching between noise and token codes, with a network that predicts the clean tokens.

Every token v has a fixed code c_v on a sphere of radius sqrt(d). The path of a token is z_t = t c_v + (1 - t) noise.
Given z_t, Bayes' rule turns probabilities of the token without z_t into probabilities with it by adding
log N(z_t; t c_v, (1 - t)^2 I) to the logits. The network predicts only what the context adds.

Shapes: K tokens of a patch, d code size, V vocabulary, ... any leading dimensions.
Source: variational flow matching (Eijkelboom et al. 2024, arXiv 2406.04843).
"""

import math

import torch
from torch import Tensor


def token_codes(vocab_size: int, code_size: int, seed: int = 0) -> Tensor:
    """Return a random code for every token, of length sqrt(d): ``[V, d]``, the same for the same arguments."""
    generator = torch.Generator("cpu").manual_seed(seed)
    codes = torch.randn(vocab_size, code_size, generator=generator, device="cpu", dtype=torch.float64)
    return (codes * (math.sqrt(code_size) / codes.norm(dim=-1, keepdim=True))).float()


def smallest_distance(codes: Tensor) -> float:
    """Return the distance of the closest pair of codes ``[V, d]``, computed in tiles."""
    norms = codes.square().sum(-1)
    tile_size = max(1, 2**24 // len(codes))
    smallest = math.inf
    for start in range(0, len(codes), tile_size):
        tile = codes[start : start + tile_size]
        squared = norms[start : start + tile_size, None] + norms - 2 * tile @ codes.T
        rows = torch.arange(len(tile), device=codes.device)
        squared[rows, start + rows] = math.inf
        smallest = min(smallest, squared.min().item())
    return math.sqrt(max(smallest, 0.0))


def code_logit_scale(time: Tensor) -> Tensor:
    """Return a(t) = t / (1 - t)^2: a(t) <z_t, c_v> is the log-likelihood of z_t given token v, up to a constant.

    All codes have the same length, so the quadratic term of the Gaussian is the same for every token.
    """
    return time / (1 - time).square()


def euler_step(points: Tensor, clean: Tensor, time: Tensor, next_time: Tensor) -> Tensor:
    """Move points along dz/dt = (E[c | z_t] - z_t) / (1 - t) in one Euler step.

    Args:
        points: z_t, ``[..., K, d]``.
        clean: expected codes E[c | z_t], ``[..., K, d]``.
        time, next_time: t before and after the step, scalars, time below 1. At next_time 1 the result is ``clean``.
    """
    return points + (next_time - time) / (1 - time) * (clean - points)
