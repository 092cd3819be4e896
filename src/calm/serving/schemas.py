"""Requests as OpenAI's API has them, and which of their parameters are refused.

Parameters of sampling come from :class:`~calm.generation.sampling_params.SamplingParams`.
"""

from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    create_model,
    field_validator,
    model_validator,
)

from calm.data.text import half_character
from calm.generation.samplers import canonical_name, find_sampler, sampler_names
from calm.generation.sampling_params import SamplingParams, described_parameters

_SAFER = "top_p or a lower temperature makes text safer"
_ONLY_TEXT = "this server reads and writes only text"
_NO_TOOLS = "this server has no tools"
# Parameters without a meaning here: values that change nothing, and why others are refused.
_REFUSED: dict[str, tuple[tuple, str]] = {
    "top_k": ((0, -1), _SAFER),
    "min_p": ((0,), _SAFER),
    "frequency_penalty": ((0,), _SAFER),
    "presence_penalty": ((0,), _SAFER),
    "repetition_penalty": ((1,), _SAFER),
    "logit_bias": (({},), "single tokens cannot be made more likely"),
    "best_of": ((1,), "texts are not ranked; request n"),
    "echo": ((False,), "the prompt is not repeated"),
    "suffix": (("",), "the model only continues"),
    "tools": (([],), _NO_TOOLS),
    "tool_choice": (("none", "auto"), _NO_TOOLS),
    "parallel_tool_calls": ((True, False), _NO_TOOLS),
    "functions": (([],), _NO_TOOLS),
    "function_call": (("none", "auto"), _NO_TOOLS),
    "response_format": (({"type": "text"},), "text cannot be forced into a format"),
    "modalities": ((["text"],), _ONLY_TEXT),
    "audio": ((), _ONLY_TEXT),
    "prediction": ((), "this server does not use a predicted text"),
    "web_search_options": ((), _NO_TOOLS),
    "moderation": ((), "this server moderates nothing"),
    "reasoning_effort": (("none",), "the model does not reason before it responds"),
    "verbosity": (("medium",), "only max_tokens limits the length of a response"),
}
# Parameters that do not concern the model.
_IGNORED = (
    "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention",
    "prompt_cache_options",
)  # fmt: skip
# Fields of OpenAI's messages that this server does not use, with their empty values.
_EMPTY_IN_MESSAGES: dict[str, tuple] = {
    "refusal": ("",), "annotations": ([],), "audio": (), "function_call": (), "tool_calls": ([],),
    "tool_call_id": (), "reasoning_content": ("",), "reasoning": ("",),
}  # fmt: skip

Text = Annotated[str, StringConstraints(strict=True)]
Token = Annotated[int, Field(strict=True, ge=0, lt=2**31)]
# The first error of a list is enough, and a list may be long.
Texts = Annotated[list[Text], Field(fail_fast=True)]
Tokens = Annotated[list[Token], Field(fail_fast=True)]


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    include_usage: bool | None = False
    include_obfuscation: bool | None = Field(False, description="accepted, and not done")


def _sampling_fields() -> dict[str, Any]:
    """Return the fields of the parameters that :class:`SamplingParams` describes."""
    fields: dict[str, Any] = {}
    for name, (kind, described) in described_parameters().items():
        extra = {"enum": [*sampler_names(), None]} if name == "sampler" else None
        options = {"ge": described["least"], "le": described["most"], "json_schema_extra": extra}
        options = {option: value for option, value in options.items() if value is not None}
        fields[name] = (kind | None, Field(None, description=described["help"], **options))
    return fields


class _StrictRequest(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, strict=True)


_Sampling: Any = create_model("_Sampling", __base__=_StrictRequest, **_sampling_fields())


class SamplingRequest(_Sampling):
    """Parameters of completions and chats."""

    model: Text | None = None
    seed: int | None = Field(None, ge=0, lt=2**63, description="the same seed gives the same text; default: random")
    n: int = Field(1, ge=1, le=128, description="texts of every prompt")
    stop: Text | list[Text] | None = Field(None, description="texts that end the response, at most 16; left out of it")
    stream: bool = False
    stream_options: StreamOptions | None = None

    @model_validator(mode="before")
    @classmethod
    def _refuse(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        for name, (neutral, reason) in _REFUSED.items():
            if name in values and not _is_neutral(values[name], neutral):
                raise ValueError(f"{name} is not supported: {reason}")
        # null selects the default; a parameter that does not exist here may be null, too.
        return {
            name: value
            for name, value in values.items()
            if value is not None and name not in _REFUSED and name not in _IGNORED
        }

    @field_validator("sampler", check_fields=False)
    @classmethod
    def _check_sampler(cls, name: str | None) -> str | None:
        if name is not None:
            find_sampler(name)
            return canonical_name(name)
        return name

    @field_validator("stop")
    @classmethod
    def _check_stop(cls, stop: str | list[str] | None) -> str | list[str] | None:
        texts = [stop] if isinstance(stop, str) else stop or []
        if len(texts) > 16 or any(not 0 < len(text) <= 1000 for text in texts):
            raise ValueError("stop must be at most 16 texts of 1 to 1000 characters")
        for text in texts:
            check_text(text)
        return stop

    @property
    def stop_texts(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @property
    def num_logprobs(self) -> int | None:
        """Number of the most likely tokens that are returned at every position; None without log-probabilities."""
        raise NotImplementedError

    def sampling_params(self, max_tokens: int) -> SamplingParams:
        """Return the parameters of sampling; those that the request leaves out are None."""
        described = {name: getattr(self, name) for name in described_parameters()}
        return SamplingParams(
            **described, max_new_tokens=max_tokens, stop=tuple(self.stop_texts), logprobs=self.num_logprobs
        )


class CompletionRequest(SamplingRequest):
    logprobs: int | None = Field(
        None, ge=0, le=20, description="return log-probabilities, also of this many of the most likely tokens"
    )
    prompt: Text | Texts | Tokens | Annotated[list[Tokens], Field(fail_fast=True)] = Field(
        "", description="a text, token ids, or a list of either; an empty text starts a new document"
    )
    max_tokens: int = Field(128, ge=1, le=2**20)

    @property
    def num_logprobs(self) -> int | None:
        return self.logprobs

    @field_validator("prompt")
    @classmethod
    def _check_prompt(cls, prompt: Any) -> Any:
        texts = [prompt] if isinstance(prompt, str) else [text for text in prompt if isinstance(text, str)]
        for text in texts:
            check_text(text)
        return prompt

    @property
    def prompts(self) -> list[str | list[int]]:
        if isinstance(self.prompt, str) or all(isinstance(token, int) for token in self.prompt):
            return [self.prompt]  # type: ignore[list-item]
        return list(self.prompt)  # type: ignore[arg-type]


class TextPart(BaseModel):
    model_config = ConfigDict(extra="forbid")
    type: Literal["text"]
    text: Text
    prompt_cache_breakpoint: Any = Field(None, description="accepted, and without effect")


class Message(BaseModel):
    model_config = ConfigDict(extra="forbid")
    role: Text
    content: Text | Annotated[list[TextPart], Field(fail_fast=True)] | None = Field(
        description="a text, or a list of parts that are text; null is an empty text"
    )
    name: Text | None = None

    @property
    def text(self) -> str:
        if isinstance(self.content, list):
            return "".join(part.text for part in self.content)
        return self.content or ""

    @model_validator(mode="before")
    @classmethod
    def _leave_out(cls, values: Any) -> Any:
        """Accept a message as clients send back a response: with empty fields."""
        if not isinstance(values, dict):
            return values
        for name, empty in _EMPTY_IN_MESSAGES.items():
            if name in values and not _is_neutral(values[name], empty):
                raise ValueError(f"{name} of a message is not supported: {_ONLY_TEXT}")
        return {
            name: value
            for name, value in values.items()
            if name not in _EMPTY_IN_MESSAGES and (value is not None or name == "content")
        }

    @model_validator(mode="after")
    def _check(self) -> "Message":
        check_text(self.text)
        check_text(self.role)
        return self


class ChatRequest(SamplingRequest):
    messages: list[Message] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1, le=2**20, description="default: what the context has room for")
    max_completion_tokens: int | None = Field(None, ge=1, le=2**20, description="the newer name of max_tokens")
    logprobs: bool = Field(False, description="return the log-probability of every token")
    top_logprobs: int | None = Field(
        None, ge=0, le=20, description="also return this many of the most likely tokens; needs logprobs"
    )

    @model_validator(mode="after")
    def _check_logprobs(self) -> "ChatRequest":
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        return self

    @property
    def num_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


def check_text(text: str) -> None:
    """Raise ValueError for half of a surrogate pair, which JSON allows and UTF-8 does not."""
    if (place := half_character(text)) is not None:
        raise ValueError(f"a text has half of a surrogate pair (character {place})")


def _is_neutral(value: Any, neutral: tuple) -> bool:
    """Return whether a value changes nothing: null, or one of the neutral ones."""
    return value is None or any(_equal(value, each) for each in neutral)


def _equal(value: Any, neutral: Any) -> bool:
    # 1 == True in Python, and not in JSON.
    return value == neutral and isinstance(value, bool) == isinstance(neutral, bool)
