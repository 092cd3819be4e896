"""Random numbers from one generator, or from one per row.

A list of generators gives every row of a batch its own stream: what a row gets does not depend on its neighbours.
Unless said otherwise the rows are the last dimension but one.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Generator = torch.Generator | Sequence[torch.Generator] | None


def uniform(
    shape: Sequence[int],
    generator: Generator = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    row_dim: int = -2,
) -> Tensor:
    """Uniform in [0, 1), ``[..., rows, X]``."""
    return _draw(torch.rand, shape, generator, device, dtype, row_dim)


def normal(
    shape: Sequence[int],
    generator: Generator = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    row_dim: int = -2,
) -> Tensor:
    """Standard normal, ``[..., rows, X]``."""
    return _draw(torch.randn, shape, generator, device, dtype, row_dim)


def categorical(probs: Tensor, num_draws: int, generator: Generator = None, row_dim: int = -2) -> Tensor:
    """Independent draws of a distribution over V values, ``[..., V] -> [..., num_draws]``."""
    return pick(probs, uniform((*probs.shape[:-1], num_draws), generator, probs.device, row_dim=row_dim))


def pick(probs: Tensor, uniforms: Tensor) -> Tensor:
    """The values that uniform random numbers stand for: ``[..., V], [..., draws] -> [..., draws]``.

    By the inverse of the distribution function: one random number for a draw, not one for a value.
    """
    cumulative = probs.cumsum(-1)
    drawn = torch.searchsorted(cumulative, uniforms * cumulative[..., -1:], right=True)
    return drawn.clamp(max=probs.shape[-1] - 1)


def finest(device: torch.device) -> torch.dtype:
    """float64; float32 on Apple's GPUs, which have nothing finer."""
    return torch.float32 if device.type == "mps" else torch.float64


def of_rows(generator: Generator, rows: Tensor) -> Generator:
    """The generators of some rows; one generator serves all of them."""
    return [generator[row] for row in rows.tolist()] if isinstance(generator, Sequence) else generator


def check_rows(generator: Generator, num_rows: int) -> None:
    """Raises ValueError when a list of generators has not one for every row."""
    if isinstance(generator, Sequence) and len(generator) != num_rows:
        raise ValueError(f"{len(generator)} generators were given for {num_rows} rows: give one, or one per row.")


def _draw(
    function: Callable[..., Tensor],
    shape: Sequence[int],
    generator: Generator,
    device: torch.device | str | None,
    dtype: torch.dtype | None,
    row_dim: int,
) -> Tensor:
    if not isinstance(generator, Sequence):
        return _draw_one(function, shape, generator, device, dtype)
    check_rows(generator, shape[row_dim])
    one = list(shape)
    del one[row_dim]
    return torch.stack([_draw_one(function, one, each, device, dtype) for each in generator], row_dim)


def _draw_one(
    function: Callable[..., Tensor],
    shape: Sequence[int],
    generator: torch.Generator | None,
    device: torch.device | str | None,
    dtype: torch.dtype | None,
) -> Tensor:
    if generator is None:  # a compiled step takes no argument for none
        return function(*shape, device=device, dtype=dtype)
    if device is None or generator.device.type == torch.device(device).type:
        return function(*shape, generator=generator, device=device, dtype=dtype)
    # A generator of the CPU gives a GPU the numbers that it gives the CPU.
    return function(*shape, generator=generator, device=generator.device, dtype=dtype).to(device)
