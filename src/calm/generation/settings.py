"""The settings of one call of ``generate``: arguments, the settings saved with the model, defaults.

Sampling parameters are defined in :mod:`calm.generation.sampling_params`; here are the parameters of transformers'
``generate`` around them.
"""

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, GenerationMixin

from calm.generation.samplers import canonical_name
from calm.generation.sampling_params import DEFAULTS, SamplingParams
from calm.utils.files import check_json

# The fields of a new model's generation_config.json beside its end-of-text and padding tokens.
GENERATION_DEFAULTS: dict[str, Any] = {
    "do_sample": True,
    **{name: DEFAULTS[name] for name in ("temperature", "sampler", "num_candidates", "max_new_tokens")},
}
_SAMPLING = {field.name for field in dataclasses.fields(SamplingParams)} - {"stop", "seed"}
# The other parameters of transformers' generate that have a meaning here, with their defaults.
_OTHERS: dict[str, Any] = {
    "max_length": None,
    "num_return_sequences": 1,
    "stop_strings": None,
    "return_dict_in_generate": False,
    "max_time": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
# Parameters without a meaning here that generation_config.json files and callers written for token models set, with the
# values that change nothing for a token model either (... is any value). Other values are refused by name: an ignored
# penalty or beam search would be a different text than the caller asked for.
_NEUTRAL = {
    "do_sample": True, "use_cache": ..., "num_beams": 1, "num_beam_groups": 1, "top_k": 0, "min_p": 0.0,
    "typical_p": 1.0, "repetition_penalty": 1.0, "length_penalty": 1.0, "no_repeat_ngram_size": 0, "synced_gpus": False,
    "logits_processor": [], "output_scores": False, "output_logits": False, "output_attentions": False,
    "output_hidden_states": False, "min_length": 0, "early_stopping": False, "renormalize_logits": False,
    "diversity_penalty": 0.0, "guidance_scale": 1.0, "epsilon_cutoff": 0.0, "eta_cutoff": 0.0,
    "encoder_repetition_penalty": 1.0, "encoder_no_repeat_ngram_size": 0, "remove_invalid_values": False,
    "disable_compile": ..., "cache_implementation": ..., "trust_remote_code": ..., "token_type_ids": ...,
    "bos_token_id": ..., "transformers_version": ..., "_from_model_config": ...,
}  # fmt: skip

_PARAMETERS = (
    "max_new_tokens, temperature, sampler, num_candidates, top_p, logprobs, num_return_sequences, stop_strings, "
    "stopping_criteria, max_time, streamer, generator, sampling_params and compile"
)


# Types of the fields of a generation_config.json; transformers checks the others.
_NUMBERS = ("temperature", "top_p", "min_p", "typical_p", "repetition_penalty", "length_penalty", "max_time")
_WHOLE_NUMBERS = (
    "max_new_tokens", "max_length", "min_length", "min_new_tokens", "top_k", "num_beams", "num_candidates",
    "num_return_sequences", "pad_token_id", "bos_token_id", "no_repeat_ngram_size",
)  # fmt: skip
_FLAGS = ("do_sample", "use_cache", "return_dict_in_generate", "output_scores", "output_logits")


def check_generation_config(path: Path) -> None:
    """Raise ValueError when a ``generation_config.json`` exists and has a field of the wrong type."""
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

    params: SamplingParams  # without None, but for seed and logprobs
    num_return_sequences: int
    return_dict_in_generate: bool
    max_time: float | None
    end_ids: list[int]
    pad_id: int
    prompt_padding_id: int | None  # the token that pads prompts without a mask; None where it may be text


def saved_sampling(config: GenerationConfig) -> dict[str, Any]:
    """Return the sampling parameters that a generation config sets, by name."""
    values: dict[str, Any] = {name: getattr(config, name, None) for name in _SAMPLING}
    if isinstance(name := values["sampler"], str):
        values["sampler"] = canonical_name(name, warn=False)  # the caller may not be able to change the file
    return {name: value for name, value in values.items() if value is not None}


def resolve_settings(
    arguments: dict[str, Any],
    sampling_params: SamplingParams | None,
    saved: GenerationConfig,
    own: GenerationConfig,
    prompt_length: int,
) -> GenerationSettings:
    """Return the settings of a call: arguments, then ``sampling_params``, then saved settings, then defaults.

    Args:
        arguments: of ``generate``, by name; None is not set.
        saved: of the call, or the model's.
        own: the model's; its sampler holds where nothing else names one, and its end-of-text and padding tokens where
            nothing else names an end of text.

    Raises:
        ValueError: for parameters that a CALM cannot follow, and for impossible values.
    """
    saved_fields = {name: value for name, value in saved.to_dict().items() if value is not None}
    if sampling_params is not None:
        of_params = sampling_params.given()
        of_params |= {"stop_strings": list(of_params.pop("stop"))} if "stop" in of_params else {}
        arguments = {name: value for name, value in of_params.items() if name != "seed"} | {
            name: value for name, value in arguments.items() if value is not None
        }
    arguments = {name: value for name, value in arguments.items() if value is not None}
    _refuse_foreign(arguments, saved_fields)
    values: dict[str, Any] = _OTHERS | saved_fields | arguments
    if values["eos_token_id"] is None:
        tokens = {"eos_token_id": own.eos_token_id, "pad_token_id": own.pad_token_id}
        values |= {name: token for name, token in tokens.items() if token is not None and name not in arguments}
    for name in ("num_return_sequences", "max_length"):
        if values[name] is not None and not _is_whole(values[name]):
            raise ValueError(f"{name} must be a whole number, got {values[name]!r}.")
    if values["num_return_sequences"] < 1:
        raise ValueError(f"num_return_sequences must be at least 1, got {values['num_return_sequences']}.")
    if values["max_time"] is not None and not (_is_number(values["max_time"]) and values["max_time"] > 0):
        raise ValueError(f"max_time must be a number of seconds above 0, got {values['max_time']!r}.")
    # The limit of the arguments precedes the saved one, whichever of its two names each has.
    limits = arguments if {"max_length", "max_new_tokens"} & arguments.keys() else saved_fields
    if "max_length" in limits and "max_new_tokens" not in limits:
        arguments = arguments | {"max_new_tokens": values["max_length"] - prompt_length}
        if arguments["max_new_tokens"] < 1:
            raise ValueError(
                f"max_length ({values['max_length']}) must be more than the prompt's {prompt_length} tokens; or use "
                "max_new_tokens."
            )
    given = {name: value for name, value in arguments.items() if name in _SAMPLING}
    params = SamplingParams(**given, stop=tuple(_as_list(values["stop_strings"])))
    end_ids = _as_list(values["eos_token_id"])
    pad_id = values["pad_token_id"]
    return GenerationSettings(
        params=params.with_defaults({"sampler": saved_sampling(own).get("sampler"), **saved_sampling(saved)}),
        num_return_sequences=values["num_return_sequences"],
        return_dict_in_generate=values["return_dict_in_generate"],
        max_time=values["max_time"],
        end_ids=end_ids,
        pad_id=pad_id if pad_id is not None else end_ids[0] if end_ids else 0,
        prompt_padding_id=None if pad_id in end_ids else pad_id,
    )


def _refuse_foreign(arguments: dict[str, Any], saved: dict[str, Any]) -> None:
    """Raise ValueError for parameters that do not exist, and for those of transformers that a CALM cannot follow."""
    known = _SAMPLING | _OTHERS.keys()
    unknown = [name for name in arguments if name not in known and name not in _NEUTRAL and not _is_foreign(name)]
    if unknown:
        raise ValueError(f"generate() has no parameter {', '.join(unknown)}; it has {_PARAMETERS}.")
    impossible = [
        f"{name}={value!r:.40}" + (" (in its generation_config)" if name not in arguments else "")
        for name, value in (saved | arguments).items()
        if name not in known and _NEUTRAL.get(name) not in (value, ...)
    ]
    if impossible:
        raise ValueError(
            f"generate() cannot follow {', '.join(impossible)}: it samples patches, so beams, penalties and scores of "
            f"single tokens do not apply; temperature=0 is greedy search. It has {_PARAMETERS}."
        )


def _is_foreign(name: str) -> bool:
    """Return whether transformers' ``generate`` has such a parameter."""
    return hasattr(GenerationConfig(), name) or name in signature(GenerationMixin.generate).parameters


def _as_list(value: Any) -> list:
    return [] if value is None else list(value) if isinstance(value, (list, tuple)) else [value]
