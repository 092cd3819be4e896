"""The number of drafted tokens, chosen while a text is generated.

A pass of the target over a few tokens takes little longer than over one, and over many tokens much longer; how much
depends on the device, the model and the batch. How many drafted tokens are accepted depends on the text. Both are
measured in the rounds of generation themselves, so that no pass is wasted on a measurement.
"""

import statistics
from collections import defaultdict, deque

import torch

from calm.functional.speculative import best_draft_length

_MEASURED_ROUNDS = 3  # of every length before the first choice; the first of them warms up
_KEPT_TIMES = 15  # of every length, the latest
_RETRY_ROUNDS = 64  # after so many rounds without a draft, one is tried again
_MEMORY = 0.98  # weight of the earlier rounds in the acceptance after one more round


class AdaptiveDraftLength:
    """Chooses the draft length with the most tokens per second, 0 included: then the target decodes alone.

    The choice depends on measured times. Greedy text does not depend on it; sampled text keeps its distribution, but
    is no longer a function of the seed alone.

    Args:
        longest: the largest number of drafted tokens.
    """

    def __init__(self, longest: int):
        if longest < 1:
            raise ValueError(f"longest must be at least 1, got {longest}.")
        self.longest = longest
        self._seconds: dict[int, deque[float]] = defaultdict(lambda: deque(maxlen=_KEPT_TIMES))
        # Every position counts as reached twice and accepted once before the first round.
        self._reached = [2.0] * longest
        self._accepted = [1.0] * longest
        self._without_draft = 0

    def choose(self) -> int:
        """Return the number of tokens to draft in the next round."""
        for length in range(self.longest, -1, -1):
            if len(self._seconds[length]) < _MEASURED_ROUNDS:
                return length
        if self._without_draft >= _RETRY_ROUNDS:
            return self.longest
        # The times of a round include the draft.
        seconds = [statistics.median(self._seconds[length]) for length in range(self.longest + 1)]
        return best_draft_length(torch.tensor(self.acceptance), seconds, 0.0)

    @property
    def acceptance(self) -> list[float]:
        """Estimated probability that each drafted token is accepted, given that those before it are."""
        return [accepted / reached for accepted, reached in zip(self._accepted, self._reached, strict=True)]

    def record(self, length: int, seconds: float, num_accepted: list[int]) -> None:
        """Add a round.

        Args:
            length: number of drafted tokens.
            seconds: of the whole round.
            num_accepted: of every row that is running.
        """
        self._seconds[length].append(seconds)
        self._without_draft = 0 if length else self._without_draft + 1
        for position in range(length):
            reached = sum(count >= position for count in num_accepted)
            accepted = sum(count > position for count in num_accepted)
            if reached:
                self._reached[position] = _MEMORY * self._reached[position] + reached
                self._accepted[position] = _MEMORY * self._accepted[position] + accepted
