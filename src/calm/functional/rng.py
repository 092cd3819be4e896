"""Random numbers from one generator, or from one stream per row.

A stream per row makes what a row gets independent of its neighbours. It is a list of ``torch.Generator`` or, on
devices, :class:`RowStreams`: all rows at once from counters, without a kernel per row and without a state that a
compiler cannot trace. Unless said otherwise the rows are the last dimension but one.

Shapes: R rows, X numbers of a row, V values of a distribution.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

# The increment and the multipliers of SplitMix64 (Steele, Lea and Flood 2014), as signed numbers.
_GAMMA, _FIRST, _SECOND = (value - 2**64 for value in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


class RowStreams:
    """A stream of random numbers for each of R rows, as a function of seed, row and position (SplitMix64).

    The numbers of a row follow from its seed and from how many it has had. They are the same on every device, in eager
    and in compiled code, and in whatever batch the row is.

    Args:
        seeds: ``[R]``, int64; rows with the same seed get the same numbers.
        positions: numbers that each row has had, ``[R]``, int64; 0 by default.
    """

    def __init__(self, seeds: Tensor, positions: Tensor | None = None):
        self.keys = _mix(seeds)
        self.positions = torch.zeros_like(seeds) if positions is None else positions
        self._parent: tuple[RowStreams, slice | Tensor] | None = None

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, rows: slice | Tensor) -> "RowStreams":
        """Return the streams of some rows. What these draw, the whole has drawn as well."""
        some: RowStreams = object.__new__(RowStreams)
        some.keys, some.positions = self.keys[rows], self.positions[rows]
        some._parent = (self, rows)
        return some

    def bits(self, count: int) -> Tensor:
        """Return the next ``count`` numbers of every row, 64 random bits each: ``[R, count]``, int64."""
        places = self.positions[:, None] + torch.arange(1, count + 1, device=self.keys.device)
        numbers = _mix(self.keys[:, None] + places * _GAMMA)
        self._advance(count)
        return numbers

    def _advance(self, count: int) -> None:
        self.positions = self.positions + count
        if self._parent is not None:
            parent, rows = self._parent
            step = torch.zeros_like(parent.positions)
            step[rows] = count
            parent._advance_by(step)

    def _advance_by(self, step: Tensor) -> None:
        self.positions = self.positions + step
        if self._parent is not None:
            parent, rows = self._parent
            whole = torch.zeros_like(parent.positions)
            whole[rows] = step
            parent._advance_by(whole)


Generator = torch.Generator | Sequence[torch.Generator] | RowStreams | None


def uniform(
    shape: Sequence[int],
    generator: Generator = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    row_dim: int = -2,
) -> Tensor:
    """Uniform in [0, 1), ``[..., R, X]``."""
    return _draw(torch.rand, shape, generator, device, dtype, row_dim)


def normal(
    shape: Sequence[int],
    generator: Generator = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    row_dim: int = -2,
) -> Tensor:
    """Standard normal, ``[..., R, X]``."""
    return _draw(torch.randn, shape, generator, device, dtype, row_dim)


def categorical(probs: Tensor, num_draws: int, generator: Generator = None, row_dim: int = -2) -> Tensor:
    """Independent samples of a distribution over V values, ``[..., V] -> [..., num_draws]``."""
    return pick(probs, uniform((*probs.shape[:-1], num_draws), generator, probs.device, row_dim=row_dim))


def pick(probs: Tensor, uniforms: Tensor) -> Tensor:
    """The values that uniform random numbers stand for: ``[..., V], [..., draws] -> [..., draws]``.

    By the inverse of the distribution function: one random number for a sample, not one for a value.
    """
    cumulative = probs.cumsum(-1)
    drawn = torch.searchsorted(cumulative, uniforms * cumulative[..., -1:], right=True)
    return drawn.clamp(max=probs.shape[-1] - 1)


def finest(device: torch.device) -> torch.dtype:
    """Return the widest dtype of a device: float64, or float32 on Apple's GPUs."""
    return torch.float32 if device.type == "mps" else torch.float64


def of_rows(generator: Generator, rows: Tensor | slice) -> Generator:
    """Return the streams of some rows; one generator serves all of them."""
    if isinstance(generator, RowStreams):
        return generator[rows]
    if isinstance(generator, Sequence):
        return generator[rows] if isinstance(rows, slice) else [generator[row] for row in rows.tolist()]
    return generator


def check_rows(generator: Generator, num_rows: int) -> None:
    """Raise ValueError when there is not a stream for every row."""
    if isinstance(generator, Sequence | RowStreams) and len(generator) != num_rows:
        raise ValueError(f"{len(generator)} generators were given for {num_rows} rows: give one, or one per row.")


def _draw(
    function: Callable[..., Tensor],
    shape: Sequence[int],
    generator: Generator,
    device: torch.device | str | None,
    dtype: torch.dtype | None,
    row_dim: int,
) -> Tensor:
    if not isinstance(generator, Sequence | RowStreams):
        return _draw_one(function, shape, generator, device, dtype)
    check_rows(generator, shape[row_dim])
    one = list(shape)
    del one[row_dim]
    if isinstance(generator, RowStreams):
        to_numbers = _to_uniform if function is torch.rand else _to_normal
        numbers = to_numbers(generator.bits(math.prod(one)), dtype or torch.get_default_dtype())
        return numbers.view(-1, *one).movedim(0, row_dim)
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


def _mix(numbers: Tensor) -> Tensor:
    """Mix the bits of every number with those of the others: a bijection of 64-bit integers."""
    numbers = (numbers ^ _shifted(numbers, 30)) * _FIRST
    numbers = (numbers ^ _shifted(numbers, 27)) * _SECOND
    return numbers ^ _shifted(numbers, 31)


def _shifted(numbers: Tensor, count: int) -> Tensor:
    """Shift to the right and fill with zeros: torch would fill with the sign."""
    return (numbers >> count) & ((1 << (64 - count)) - 1)


def _to_uniform(bits: Tensor, dtype: torch.dtype) -> Tensor:
    # As many bits as the type holds below 1: with more, some numbers would be rounded up to 1.
    digits = 1 - round(math.log2(torch.finfo(dtype).eps))
    return _shifted(bits, 64 - digits).to(dtype) * 2.0**-digits


def _to_normal(bits: Tensor, dtype: torch.dtype) -> Tensor:
    """Box-Muller: radius and angle from 32 bits each."""
    radius, angle = _shifted(bits, 32).float(), (bits & (2**32 - 1)).float()
    radius = ((radius + 0.5) * 2.0**-32).log().mul(-2).clamp(min=0).sqrt()
    return (radius * (angle * (2.0**-32 * 2 * math.pi)).cos()).to(dtype)
