"""Plain causal attention in training."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import masking_utils

_library: Any = masking_utils
_look = _library.find_packed_sequence_indices
_lock, _inside = threading.Lock(), 0  # threads may train side by side


@contextmanager
def no_packed_sequences() -> Iterator[None]:
    """While a model reads blocks of text: transformers does not look for several texts in one, which ours are not.

    It would look into the positions of every micro-batch, for which a device has to be waited for; and a compiled model
    cannot look, takes a mask of all pairs in place of causal attention, and loses the fast kernels with it.
    """
    _enter(1)
    try:
        yield
    finally:
        _enter(-1)


def _enter(change: int) -> None:
    global _inside
    with _lock:
        _inside += change
        _library.find_packed_sequence_indices = _found_nothing if _inside else _look


def _found_nothing(_positions: Any) -> None:
    return None
