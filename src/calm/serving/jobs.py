"""What the engine is asked for, and what it answers with."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from calm.serving.model_runner import Sampling


@dataclass
class Chunk:
    """What a sequence gained in a step; the last one has a ``finish_reason``: stop, length, cancelled or error."""

    text: str
    num_tokens: int
    num_drawn: int = 0
    num_decoded: int = 0
    milliseconds: float = 0.0
    finish_reason: str | None = None

    def join(self, later: "Chunk") -> None:
        """Add the chunk that follows this one."""
        self.text += later.text
        self.num_tokens += later.num_tokens
        self.num_drawn += later.num_drawn
        self.num_decoded += later.num_decoded
        self.milliseconds += later.milliseconds
        self.finish_reason = later.finish_reason


@dataclass
class Job:
    """A sequence to generate.

    Args:
        emit: called from the engine's thread with every :class:`Chunk`.
    """

    prompt_ids: list[int]
    max_tokens: int
    sampling: Sampling
    seed: int
    emit: Callable[[Chunk], None]
    stop: Sequence[str] = ()
    cancelled: bool = False
    num_tokens: int = 0
    arrived: float = field(default_factory=time.perf_counter)
    first_chunk: float | None = None

    def cancel(self) -> None:
        """Give the place to another; takes effect before the next step."""
        self.cancelled = True
