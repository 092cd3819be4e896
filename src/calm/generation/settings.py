"""What ``generate`` was asked for: arguments, the model's saved settings, defaults; and what cannot be asked for."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, GenerationMixin

from calm.functional.temperature import check_candidates, check_known_temperature
from calm.utils.files import check_json

SAMPLERS = ("batch", "exact", "direct", "token_prediction")
# Samplers that know the probabilities of the tokens: they take any temperature from 0, and never compare samples.
WITH_PROBABILITIES = ("direct", "token_prediction")
# What a model's generation_config.json says beside its end-of-text and padding tokens.
GENERATION_DEFAULTS: dict[str, Any] = {
    "do_sample": True,
    "temperature": 1.0,
    "sampler": "batch",
    "num_candidates": 200,
    "max_new_tokens": 128,
}
# Of transformers' other parameters those that mean something here, with what they are when nobody says.
_OTHERS: dict[str, Any] = {
    "max_length": None,
    "num_return_sequences": 1,
    "stop_strings": None,
    "return_dict_in_generate": False,
    "max_time": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
# Values of parameters without a meaning here that change nothing for a token model either.
_NEUTRAL = {
    "do_sample": True, "use_cache": ..., "num_beams": 1, "num_beam_groups": 1, "top_k": 0, "top_p": 1.0, "min_p": 0.0,
    "typical_p": 1.0, "repetition_penalty": 1.0, "length_penalty": 1.0, "no_repeat_ngram_size": 0, "synced_gpus": False,
    "logits_processor": [], "output_scores": False, "output_logits": False, "output_attentions": False,
    "output_hidden_states": False, "min_length": 0, "early_stopping": False, "renormalize_logits": False,
    "diversity_penalty": 0.0, "guidance_scale": 1.0, "epsilon_cutoff": 0.0, "eta_cutoff": 0.0,
    "encoder_repetition_penalty": 1.0, "encoder_no_repeat_ngram_size": 0, "remove_invalid_values": False,
    "disable_compile": ..., "cache_implementation": ..., "trust_remote_code": ..., "token_type_ids": ...,
    "bos_token_id": ..., "transformers_version": ..., "_from_model_config": ...,
}  # fmt: skip

_TAKES = (
    "max_new_tokens, temperature, sampler, num_candidates, num_return_sequences, stop_strings, stopping_criteria, "
    "max_time, streamer, generator and compile"
)


# Types of the fields of a generation_config.json; others are transformers' matter.
_NUMBERS = ("temperature", "top_p", "min_p", "typical_p", "repetition_penalty", "length_penalty", "max_time")
_WHOLE_NUMBERS = (
    "max_new_tokens", "max_length", "min_length", "min_new_tokens", "top_k", "num_beams", "num_candidates",
    "num_return_sequences", "pad_token_id", "bos_token_id", "no_repeat_ngram_size",
)  # fmt: skip
_FLAGS = ("do_sample", "use_cache", "return_dict_in_generate", "output_scores", "output_logits")


def check_generation_config(path: Path) -> None:
    """Raise ValueError for a ``generation_config.json`` that is there and has a field of the wrong type."""
    check_json(path)
    if not path.is_file():
        return
    fields = json.loads(path.read_text(encoding="utf-8"))
    expected: dict[str, tuple[str, Callable[[Any], bool]]] = {
        **dict.fromkeys(_NUMBERS, ("a number", _is_number)),
        **dict.fromkeys(_WHOLE_NUMBERS, ("a whole number", _is_whole)),
        **dict.fromkeys(_FLAGS, ("true or false", lambda value: isinstance(value, bool))),
        "eos_token_id": ("a token id or a list of them", lambda value: all(map(_is_whole, _as_list(value)))),
        "stop_strings": ("a text or a list of them", lambda value: all(isinstance(x, str) for x in _as_list(value))),
        "sampler": ("a text", lambda value: isinstance(value, str)),
    }
    for name, (what, fits) in expected.items():
        if fields.get(name) is not None and not fits(fields[name]):
            raise ValueError(f"{path}: {name} must be {what}, got {fields[name]!r:.60}.")


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


@dataclass
class GenerationSettings:
    """Checked settings of one call; names and meanings as in :meth:`CalmGenerationMixin.generate`."""

    temperature: float
    sampler: str
    num_candidates: int
    max_new_tokens: int
    num_return_sequences: int
    return_dict_in_generate: bool
    max_time: float | None
    stop_strings: list[str]
    end_ids: list[int]
    pad_id: int
    prompt_padding_id: int | None  # what is padding in prompts without a mask; None where it may be text


def resolve_settings(
    given: dict[str, Any], saved: GenerationConfig, own: GenerationConfig, prompt_length: int
) -> GenerationSettings:
    """Arguments before saved settings before defaults; where neither names an end of text, the model's tokens.

    Raises:
        ValueError: for parameters that a model without token probabilities cannot follow, and for impossible values.
    """
    saved_fields = {name: value for name, value in saved.to_dict().items() if value is not None}
    given = {name: value for name, value in given.items() if value is not None}
    known = GENERATION_DEFAULTS | _OTHERS
    senseless = [
        f"{name}={value!r:.40}" + (" (in its generation_config)" if name not in given else "")
        for name, value in (saved_fields | given).items()
        if (name not in known or name == "do_sample") and _NEUTRAL.get(name) not in (value, ...)
    ]
    if unknown := [name for name in given if name not in known and name not in _NEUTRAL and not _is_theirs(name)]:
        raise ValueError(f"generate() has no parameter {', '.join(unknown)}; it takes {_TAKES}.")
    if senseless:
        raise ValueError(
            f"generate() cannot follow {', '.join(senseless)}: it draws samples at a temperature. Greedy search, "
            "top_p, beams, penalties and scores want token probabilities, which a head does not give; a low "
            f"temperature makes text safer. It takes {_TAKES}."
        )
    values: dict[str, Any] = known | saved_fields | given
    if values["eos_token_id"] is None:
        tokens = {"eos_token_id": own.eos_token_id, "pad_token_id": own.pad_token_id}
        values |= {name: token for name, token in tokens.items() if token is not None and name not in given}
    for name in ("max_new_tokens", "num_return_sequences", "num_candidates", "max_length"):
        if values[name] is not None and (not isinstance(values[name], int) or isinstance(values[name], bool)):
            raise ValueError(f"{name} must be a whole number, got {values[name]!r}.")
    if not isinstance(values["temperature"], int | float):
        raise ValueError(f"temperature must be a number in (0, 1], got {values['temperature']!r}.")
    if values["max_time"] is not None and not (isinstance(values["max_time"], int | float) and values["max_time"] > 0):
        raise ValueError(f"max_time must be a number of seconds above 0, got {values['max_time']!r}.")
    # The arguments' limit before the saved one, whichever of its two names each has.
    limits = given if {"max_length", "max_new_tokens"} & given.keys() else saved_fields
    if "max_length" in limits and "max_new_tokens" not in limits:
        values["max_new_tokens"] = values["max_length"] - prompt_length
        if values["max_new_tokens"] < 1:
            raise ValueError(
                f"max_length ({values['max_length']}) must be more than the prompt's {prompt_length} tokens; or say "
                "max_new_tokens."
            )
    for name in ("max_new_tokens", "num_return_sequences"):
        if values[name] < 1:
            raise ValueError(f"{name} must be at least 1, got {values[name]}.")
    if "" in _as_list(values["stop_strings"]):
        raise ValueError("stop_strings must not be empty texts.")
    end_ids = _as_list(values["eos_token_id"])
    pad_id = values["pad_token_id"]
    return GenerationSettings(
        temperature=values["temperature"],
        sampler=values["sampler"],
        num_candidates=values["num_candidates"],
        max_new_tokens=values["max_new_tokens"],
        num_return_sequences=values["num_return_sequences"],
        return_dict_in_generate=values["return_dict_in_generate"],
        max_time=values["max_time"],
        stop_strings=_as_list(values["stop_strings"]),
        end_ids=end_ids,
        pad_id=pad_id if pad_id is not None else end_ids[0] if end_ids else 0,
        prompt_padding_id=None if pad_id in end_ids else pad_id,
    )


def check_sampler(sampler: str, temperature: float, num_candidates: int) -> None:
    """ValueError for a sampler that there is not, and for settings that it cannot follow."""
    if sampler not in SAMPLERS:
        raise ValueError(f"sampler must be one of {', '.join(SAMPLERS)}, got {sampler!r}.")
    if sampler in WITH_PROBABILITIES:
        check_known_temperature(temperature)
    else:
        check_candidates(num_candidates, temperature)


def _is_theirs(name: str) -> bool:
    """Whether transformers' ``generate`` has such a parameter."""
    return hasattr(GenerationConfig(), name) or name in signature(GenerationMixin.generate).parameters


def _as_list(value: Any) -> list:
    return [] if value is None else list(value) if isinstance(value, (list, tuple)) else [value]
