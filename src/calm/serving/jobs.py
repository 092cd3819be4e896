"""Jobs of the engine, and what they emit."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from calm.generation.samplers import TokenLogprobs
from calm.generation.sampling_params import SamplingParams


@dataclass
class TokenLogprob:
    """Log-probability in nats of a token, and of the most likely tokens at its position, in descending order."""

    token: int
    logprob: float
    top: list[tuple[int, float]] = field(default_factory=list)

    @classmethod
    def lists(cls, logprobs: TokenLogprobs, tokens: Tensor) -> list[list["TokenLogprob"]]:
        """Return those of patches ``[n, K]``: a list of K for every row."""
        columns = (tokens, logprobs.tokens, logprobs.top_ids, logprobs.top)
        rows = zip(*(column.tolist() for column in columns), strict=True)
        return [
            [cls(token, own, list(zip(ids, top, strict=True))) for token, own, ids, top in zip(*row, strict=True)]
            for row in rows
        ]


@dataclass
class Delta:
    """What a sequence gained in a step; the last one has a ``finish_reason``: stop, length, cancelled or error."""

    text: str
    num_tokens: int
    num_samples: int = 0
    num_decoded: int = 0
    milliseconds: float = 0.0
    finish_reason: str | None = None
    logprobs: list[TokenLogprob] = field(default_factory=list)

    def join(self, later: "Delta") -> None:
        """Add the delta that follows this one."""
        self.text += later.text
        self.num_tokens += later.num_tokens
        self.num_samples += later.num_samples
        self.num_decoded += later.num_decoded
        self.milliseconds += later.milliseconds
        self.finish_reason = later.finish_reason
        self.logprobs = self.logprobs + later.logprobs


@dataclass
class Job:
    """A sequence to generate.

    Args:
        params: as :meth:`~calm.generation.model_runner.ModelRunner.resolve` returns them; ``seed`` is that of the
            sequence.
        emit: called from the engine's thread with every :class:`Delta`.
    """

    prompt_ids: list[int]
    params: SamplingParams
    emit: Callable[[Delta], None]
    cancelled: bool = False
    num_tokens: int = 0
    arrived: float = field(default_factory=time.perf_counter)
    first_patch: float | None = None  # seconds until it was sampled

    def __post_init__(self) -> None:
        self.step_params = self.params.of_a_step()
        self.max_new_tokens: int = self.params.max_new_tokens or 0

    def cancel(self) -> None:
        """Free the slot of the sequence before the next step."""
        self.cancelled = True
