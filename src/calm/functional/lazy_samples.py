"""Samples of the next patch that are decoded only as far as a decision needs them.

A comparison of two samples ends at the first token that differs, and most samples differ early. The product with the
vocabulary, by far the largest cost of a sample, is computed only for the tokens that are compared.

Shapes: B contexts, R contexts that are still undecided, S samples of each so far, K tokens of a patch, H width of the
undecoded state of a sample.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from calm.functional.rng import Generator, finest, of_rows, uniform

# Decoding this few tokens costs no more than reading the weights of the vocabulary: then all that remain are decoded.
_FEW_TOKENS = 32


class LazySamples:
    """Independent samples of R contexts at temperature 1.

    Attributes:
        rows: numbers of the contexts, 0 to B - 1, ``[R]``.
        tokens: ``[R, S, K]``, -1 where not decoded yet; a sample is decoded from its first token on.
        num_samples, num_decoded: samples and decoded tokens of every context, ``[B]``.
    """

    def __init__(
        self,
        sample: Callable[[Tensor, int, Generator], Tensor],
        decode: Callable[[Tensor, int, int], Tensor],
        num_rows: int,
        patch_size: int,
        generator: Generator = None,
        device: torch.device | str | None = None,
    ):
        """
        Args:
            sample: ``sample(rows, count, generator)`` returns the states ``[len(rows), count, H]`` of new samples.
            decode: ``decode(states, start, stop)`` returns tokens start to stop: ``[P, H] -> [P, stop - start]``.
            generator: one for all rows, or a list of one per row.
        """
        self._sample, self._decode, self._generator = sample, decode, generator
        self.rows = torch.arange(num_rows, device=device)
        self._states: Tensor | None = None
        self.tokens = torch.empty((num_rows, 0, patch_size), dtype=torch.long, device=device)
        self.num_samples, self.num_decoded = torch.zeros((2, num_rows), dtype=torch.long, device=device)

    @property
    def count(self) -> int:
        """S, samples of every row."""
        return self.tokens.shape[1]

    def sample(self, count: int) -> None:
        """Add ``count`` samples to every row."""
        if count <= 0 or len(self.rows) == 0:
            return
        states = self._sample(self.rows, count, of_rows(self._generator, self.rows))
        self._states = states if self._states is None else torch.cat([self._states, states], dim=1)
        undecoded = self.tokens.new_full((len(self.rows), count, self.tokens.shape[2]), -1)
        self.tokens = torch.cat([self.tokens, undecoded], dim=1)
        self.num_samples[self.rows] += count

    def decode(self, needed: Tensor, position: int) -> Tensor:
        """Return the tokens at a position ``[R, S]``, decoded wherever ``needed [R, S]``."""
        row, index = (needed & (self.tokens[:, :, position] < 0)).nonzero(as_tuple=True)
        if len(row) > 0:
            assert self._states is not None
            patch_size = self.tokens.shape[2]
            stop = patch_size if len(row) * (patch_size - position) <= _FEW_TOKENS else position + 1
            self.tokens[row, index, position:stop] = self._decode(self._states[row, index], position, stop)
            self.num_decoded.index_add_(0, self.rows[row], torch.full_like(row, stop - position))
        return self.tokens[:, :, position]

    def patches(self, index: Tensor) -> Tensor:
        """Return one sample of every row, fully decoded: ``[R] -> [R, K]``."""
        chosen = torch.zeros(self.tokens.shape[:2], dtype=torch.bool, device=index.device)
        chosen.scatter_(1, index[:, None], True)
        for position in range(self.tokens.shape[2]):
            self.decode(chosen, position)
        return self.tokens[torch.arange(len(index), device=index.device), index]

    def equal(self, first: Tensor, others: Tensor, compared: Tensor, all_of_them: bool = False) -> Tensor:
        """Return whether samples are the same patch: ``[R, A], [R, A, W] -> [R, A, W]``, False where not ``compared``.

        Args:
            first, others: indices of samples.
            all_of_them: whether the caller only needs to know if all W equal the first; then the first difference ends
                the comparison.
        """
        equal = compared
        for position in range(self.tokens.shape[2]):
            needed = torch.zeros(self.tokens.shape[:2], dtype=torch.long, device=first.device)
            needed.scatter_add_(1, others.flatten(1), equal.flatten(1).long())
            needed.scatter_add_(1, first, equal.any(-1).long())
            token = self.decode(needed > 0, position)
            same = token.gather(1, others.flatten(1)).view_as(others) == token.gather(1, first)[:, :, None]
            equal = equal & same
            if all_of_them:
                equal = equal & equal.all(-1, keepdim=True)
        return equal

    def part(self, chosen: Tensor) -> "LazySamples":
        """Return some of the rows (a mask ``[R]``) with all their samples; the counters stay shared."""
        part = object.__new__(LazySamples)
        part.__dict__.update(self.__dict__)
        part.rows, part.tokens = self.rows[chosen], self.tokens[chosen]
        part._states = None if self._states is None else self._states[chosen]
        return part

    def uniform(self, *shape: int) -> Tensor:
        """Return random numbers in [0, 1) of every row, ``[R, *shape]``, in the widest float type of the device."""
        width = shape[-1]
        size = (*shape[:-1], len(self.rows), width)
        device = self.tokens.device
        uniforms = uniform(size, of_rows(self._generator, self.rows), device, finest(device))
        return uniforms.movedim(-2, 0)
