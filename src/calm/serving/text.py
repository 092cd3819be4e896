"""The text of a sequence while it grows: only whole characters, and nothing after a stop string."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from calm.data.text import ContinuationDecoder


class TextStream:
    """The text of one sequence, piece by piece.

    Args:
        stop: texts that end the sequence; they and what follows them are left out.
        prompt_ids: token ids that the sequence continues.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str] = (), prompt_ids: Sequence[int] = ()):
        self.stop = list(stop)
        self.stopped = False
        self._decoder = ContinuationDecoder(tokenizer, prompt_ids)
        self._held = ""  # may be the beginning of a stop string

    def add(self, ids: Sequence[int], last: bool = False) -> str:
        """Add tokens and return the text that is final now; with ``last``, all that is left."""
        new = self._held + self._decoder.add(ids, last)
        ends = [end for text in self.stop if (end := new.find(text)) >= 0]
        if ends:
            self.stopped, self._held = True, ""
            return new[: min(ends)]
        held = 0 if last else max((_overlap(new, text) for text in self.stop), default=0)
        self._held = new[len(new) - held :]
        return new[: len(new) - held]


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest end of a text that is a beginning of a stop string."""
    return next((size for size in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:size])), 0)
