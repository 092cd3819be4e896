"""Token codes: a fixed vector for every token, so that a patch of tokens is one continuous vector.

Shapes: d code size, V vocabulary.
"""

import math

import torch
from torch import Tensor


def token_codes(vocab_size: int, code_size: int, seed: int = 0) -> Tensor:
    """Return a random code for every token, of length sqrt(d): ``[V, d]``, the same for the same arguments."""
    generator = torch.Generator("cpu").manual_seed(seed)
    codes = torch.randn(vocab_size, code_size, generator=generator, device="cpu", dtype=torch.float64)
    return (codes * (math.sqrt(code_size) / codes.norm(dim=-1, keepdim=True))).float()


def smallest_distance(codes: Tensor, rows: Tensor | None = None) -> float:
    """Return the distance of the closest pair of codes ``[V, d]``.

    Args:
        rows: indices of codes that are compared with all others; default all.
    """
    rows = torch.arange(len(codes), device=codes.device) if rows is None else rows
    norms, smallest = codes.square().sum(-1), math.inf
    for some in rows.split(max(1, 2**24 // len(codes))):
        squared = norms[some, None] + norms - 2 * codes[some] @ codes.T
        squared.scatter_(1, some[:, None], math.inf)
        smallest = min(smallest, squared.min().item())
    return math.sqrt(max(smallest, 0.0))
