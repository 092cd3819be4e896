"""Draws of the next chunk that are decoded only as far as a decision needs them.

Comparing two draws ends at the first token that differs, and most draws differ early; the product with the vocabulary,
by far the largest cost of a draw, is done for the tokens that are looked at.

Shapes: B contexts, R of them still undecided, S draws of each so far, K tokens of a chunk, H a draw's undecoded state.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from calm.functional.rng import Generator, finest, of_rows, uniform

# Decoding so few tokens costs what reading the vocabulary's weights costs: then all that remain are decoded at once.
_FEW_TOKENS = 32


class Draws:
    """Independent draws of R contexts at temperature 1.

    Attributes:
        rows: the contexts' numbers, 0 to B - 1, ``[R]``.
        tokens: ``[R, S, K]``, -1 where not decoded yet; a draw is decoded from its first token on.
        num_drawn, num_decoded: draws and decoded tokens of every context, ``[B]``.
    """

    def __init__(
        self,
        draw: Callable[[Tensor, int, Generator], Tensor],
        decode: Callable[[Tensor, int, int], Tensor],
        num_rows: int,
        patch_size: int,
        generator: Generator = None,
        device: torch.device | str | None = None,
    ):
        """
        Args:
            draw: ``draw(rows, count, generator)`` gives states ``[len(rows), count, H]`` of so many new draws.
            decode: ``decode(states, start, stop)``, tokens start to stop of states: ``[P, H] -> [P, stop - start]``.
            generator: one for all rows, or a list of one per row.
        """
        self._draw, self._decode, self._generator = draw, decode, generator
        self.rows = torch.arange(num_rows, device=device)
        self._states: Tensor | None = None
        self.tokens = torch.empty((num_rows, 0, patch_size), dtype=torch.long, device=device)
        self.num_drawn, self.num_decoded = torch.zeros((2, num_rows), dtype=torch.long, device=device)

    @property
    def count(self) -> int:
        """S, draws of every row."""
        return self.tokens.shape[1]

    def draw(self, count: int) -> None:
        """Add draws to every row."""
        if count <= 0 or len(self.rows) == 0:
            return
        states = self._draw(self.rows, count, of_rows(self._generator, self.rows))
        self._states = states if self._states is None else torch.cat([self._states, states], dim=1)
        unknown = self.tokens.new_full((len(self.rows), count, self.tokens.shape[2]), -1)
        self.tokens = torch.cat([self.tokens, unknown], dim=1)
        self.num_drawn[self.rows] += count

    def decode(self, needed: Tensor, position: int) -> Tensor:
        """Tokens at a position ``[R, S]``, known wherever ``needed [R, S]``."""
        row, index = (needed & (self.tokens[:, :, position] < 0)).nonzero(as_tuple=True)
        if len(row) > 0:
            assert self._states is not None
            patch_size = self.tokens.shape[2]
            stop = patch_size if len(row) * (patch_size - position) <= _FEW_TOKENS else position + 1
            self.tokens[row, index, position:stop] = self._decode(self._states[row, index], position, stop)
            self.num_decoded.index_add_(0, self.rows[row], torch.full_like(row, stop - position))
        return self.tokens[:, :, position]

    def chunks(self, index: Tensor) -> Tensor:
        """One draw of every row, whole: ``[R] -> [R, K]``."""
        chosen = torch.zeros(self.tokens.shape[:2], dtype=torch.bool, device=index.device)
        chosen.scatter_(1, index[:, None], True)
        for position in range(self.tokens.shape[2]):
            self.decode(chosen, position)
        return self.tokens[torch.arange(len(index), device=index.device), index]

    def equal(self, first: Tensor, others: Tensor, asked: Tensor, all_of_them: bool = False) -> Tensor:
        """Whether draws are the same chunk: ``[R, A], [R, A, W] -> [R, A, W]``, False where not ``asked``.

        Args:
            first, others: indices of draws.
            all_of_them: the question is whether all W equal the first; the first difference settles it.
        """
        equal = asked
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

    def part(self, chosen: Tensor) -> "Draws":
        """Some of the rows (a mask ``[R]``) with all their draws; the counts stay common."""
        part = object.__new__(Draws)
        part.__dict__.update(self.__dict__)
        part.rows, part.tokens = self.rows[chosen], self.tokens[chosen]
        part._states = None if self._states is None else self._states[chosen]
        return part

    def uniform(self, *shape: int) -> Tensor:
        """Random numbers in [0, 1) of every row: ``[R, *shape]``, in the finest floats there are."""
        width = shape[-1]
        size = (*shape[:-1], len(self.rows), width)
        device = self.tokens.device
        uniforms = uniform(size, of_rows(self._generator, self.rows), device, finest(device))
        return uniforms.movedim(-2, 0)
