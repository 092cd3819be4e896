"""Plain causal attention in training."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import masking_utils


@contextmanager
def no_packed_sequences() -> Iterator[None]:
    """While a model reads blocks of text: transformers does not look for several texts in one, which ours are not.

    It would look into the positions of every micro-batch, for which a device has to be waited for; and a compiled model
    cannot look, takes a mask of all pairs in place of causal attention, and loses the fast kernels with it.
    """
    library: Any = masking_utils
    look = library.find_packed_sequence_indices
    library.find_packed_sequence_indices = lambda _positions: None
    try:
        yield
    finally:
        library.find_packed_sequence_indices = look
