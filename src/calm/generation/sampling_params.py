"""The parameters of sampling, for ``generate``, files of prompts, evaluation, the command line and the server.

A field of :class:`SamplingParams` with a ``help`` text is an option of ``calm generate`` and a parameter of requests to
the server, without further code. This module imports neither torch nor transformers: the command line reads it.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from calm.generation.samplers import canonical_name, find_sampler

# What the parameters are where neither the caller nor the model sets them.
DEFAULTS: dict[str, Any] = {
    "temperature": 1.0,
    "sampler": "batch",
    "num_candidates": 200,
    "top_p": 1.0,
    "max_new_tokens": 128,
}


def _parameter(
    help: str = "", least: float | None = None, most: float | None = None, in_steps: bool = True, default: Any = None
) -> Any:
    """Return a field.

    Args:
        help: text for ``--help`` and for the description of the server's requests; none keeps it out of both.
        least, most: range of a number.
        in_steps: whether the next patch depends on it, so that sequences that differ in it are not sampled together.
    """
    metadata = {"help": help, "least": least, "most": most, "in_steps": in_steps}
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(frozen=True)
class SamplingParams:
    """How to continue prompts. ``None`` selects the setting saved with the model, then the default.

    Args:
        temperature: a sampler with token probabilities raises the probability of every token to the power of 1 /
            temperature; any temperature from 0 (greedy) is possible. ``batch`` and ``exact`` raise the probability of a
            whole patch to it, in (0, 1]. Default 1.
        sampler: name of a sampler, see :mod:`calm.generation.samplers`. Default: the first of ``direct``, ``mtp`` and
            ``batch`` that the model supports. A token model has one way to sample, and no sampler.
        num_candidates: number of samples that ``batch`` chooses from. Default 200.
        top_p: in [0, 1]. Sample only from the most likely tokens, as few as have this probability together. Needs a
            sampler with token probabilities. Default 1, all tokens.
        max_new_tokens: number of tokens to add at most; need not be a multiple of K. Default 128.
        stop: texts; a sequence ends with the token that completes one of them.
        seed: seed of the random numbers. Sequence i of a call uses ``seed + i``.
        logprobs: return the log-probabilities of the tokens, and those of this many of the most likely tokens at every
            position. They are the model's own, in nats, before temperature and ``top_p``. Needs a sampler with token
            probabilities.

    Raises:
        ValueError: for values that are impossible for every model. What a model cannot do is checked by
            :meth:`~calm.generation.model_runner.ModelRunner.resolve`.
    """

    temperature: float | None = _parameter(
        "0 is greedy, lower is safer text; batch and exact: in (0, 1]. Default: the model's own", least=0
    )
    sampler: str | None = _parameter("name of a sampler. Default: the model's own")
    num_candidates: int | None = _parameter("number of samples that the batch sampler chooses from", least=1)
    top_p: float | None = _parameter(
        "sample from the most likely tokens that have this probability together; needs token probabilities",
        least=0, most=1,
    )  # fmt: skip
    max_new_tokens: int | None = _parameter(least=1, in_steps=False)
    stop: tuple[str, ...] = _parameter(in_steps=False, default=())
    seed: int | None = _parameter(least=0, in_steps=False)
    logprobs: int | None = _parameter(least=0, most=20)

    def __post_init__(self) -> None:
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        if not all(isinstance(text, str) and text for text in stop):
            raise ValueError(f"stop must be texts that are not empty, got {self.stop!r:.60}.")
        object.__setattr__(self, "stop", stop)
        for field in dataclasses.fields(self):
            if (value := getattr(self, field.name)) is not None:
                _check(field, value)
        if self.sampler is not None:
            object.__setattr__(self, "sampler", canonical_name(self.sampler))
            find_sampler(self.sampler).check(self)

    def with_defaults(self, saved: Mapping[str, Any] | None = None) -> "SamplingParams":
        """Return a copy in which parameters that are None have the saved value, or else the default."""
        defaults = DEFAULTS | {name: value for name, value in (saved or {}).items() if value is not None}
        missing = {name: value for name, value in defaults.items() if getattr(self, name) is None}
        return dataclasses.replace(self, **missing)

    def of_a_step(self) -> "SamplingParams":
        """Return only what the next patch depends on: sequences that agree in it are sampled together."""
        others: dict[str, Any] = {
            field.name: field.default for field in dataclasses.fields(self) if not field.metadata["in_steps"]
        }
        return dataclasses.replace(self, **others)

    def given(self) -> dict[str, Any]:
        """Return the parameters that are set, by name."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: value for name, value in values.items() if value is not None and value != ()}


def described_parameters() -> dict[str, tuple[type, Mapping[str, Any]]]:
    """Return the type, help text and range of the parameters that command line and server take from here."""
    types = {"float | None": float, "int | None": int, "str | None": str}
    return {
        field.name: (types[str(field.type)] if isinstance(field.type, str) else _value_type(field.type), field.metadata)
        for field in dataclasses.fields(SamplingParams)
        if field.metadata["help"]
    }


def _value_type(optional: Any) -> type:
    return next(part for part in optional.__args__ if part is not type(None))


def _check(field: dataclasses.Field, value: Any) -> None:
    """Raise ValueError for a value of the wrong type or outside its range."""
    if field.name == "stop":
        return
    expected = _value_type(field.type)
    allowed: Any = (int, float) if expected is float else expected
    if not isinstance(value, allowed) or isinstance(value, bool):
        kind = {float: "a number", int: "a whole number", str: "a text"}[expected]
        raise ValueError(f"{field.name} must be {kind}, got {value!r:.60}.")
    if expected is str:
        return
    least, most = field.metadata["least"], field.metadata["most"]
    if not (least is None or value >= least) or not (most is None or value <= most) or value in (float("inf"),):
        limits = f"at least {least}" if most is None else f"in {least} to {most}"
        raise ValueError(f"{field.name} must be {limits}, got {value}.")
