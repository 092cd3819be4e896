"""Tokens to text as they come: whole characters only, nothing behind a stop string."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase


class TextStream:
    """Text of one sequence, piece by piece.

    Args:
        stop: texts that end it; they and what follows them are left out.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str] = ()):
        self.tokenizer, self.stop = tokenizer, list(stop)
        self.stopped = False
        self._ids: list[int] = []
        # Tokens from `_start` on are decoded together, as some tokenizers write a token by what stands before it.
        self._start = self._read = 0
        self._held = ""  # may be the beginning of a stop string

    def add(self, ids: Sequence[int], last: bool = False) -> str:
        """The text that is certain now; with ``last``, all that is left."""
        self._ids += ids
        before = self._decode(self._ids[self._start : self._read])
        text = self._decode(self._ids[self._start :])
        if text.endswith("�") and not last:  # a character that is not whole
            return ""
        new = self._held + text[len(before) :]
        self._start, self._read = self._read, len(self._ids)
        found = [place for each in self.stop if (place := new.find(each)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return new[: min(found)]
        held = 0 if last else max((_overlap(new, each) for each in self.stop), default=0)
        self._held = new[len(new) - held :]
        return new[: len(new) - held]

    def _decode(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of a text that is a beginning of a stop string."""
    return next((size for size in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:size])), 0)
