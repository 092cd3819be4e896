"""``generate(..., assistant_model=...)`` of transformers, for assistants that make a candidate generator of their own.

transformers chooses the candidate generator of assisted generation by the class of the assistant, in two methods that
are not public (transformers 5.17 to 5.23). An assistant with the method ``candidate_generator`` makes its own here.
"""

from collections.abc import Callable
from typing import Any

from transformers.generation import GenerationMixin

_library: Any = GenerationMixin
_METHOD = "candidate_generator"


def accept_own_candidate_generators() -> None:
    """Let ``generate`` call the method ``candidate_generator`` of an assistant; further calls change nothing.

    The method gets the target, the generation configuration, the prompt (``[1, T]``), the keyword arguments of the
    model and the tokenizer of the target (None if it is not given), and returns a ``CandidateGenerator``.
    """
    methods = ("_validate_generation_mode", "_get_candidate_generator")
    if getattr(_library, "_calm_candidate_generators", False) or not all(hasattr(_library, name) for name in methods):
        return  # without these methods transformers refuses the assistant by itself
    _library._calm_candidate_generators = True
    _library._validate_generation_mode = _with_own_checks(_library._validate_generation_mode)
    _library._get_candidate_generator = _with_own_generators(_library._get_candidate_generator)


def _with_own_checks(validate: Callable[..., None]) -> Callable[..., None]:
    def validate_generation_mode(self: Any, mode: Any, config: Any, options: dict[str, Any]) -> None:
        if hasattr(options.get("assistant_model"), _METHOD):
            _check(mode, config, options)
            options = {name: value for name, value in options.items() if name != "assistant_model"}
        validate(self, mode, config, options)

    return validate_generation_mode


def _with_own_generators(get: Callable[..., Any]) -> Callable[..., Any]:
    def get_candidate_generator(self: Any, *args: Any, assistant_model: Any = None, **options: Any) -> Any:
        if not hasattr(assistant_model, _METHOD):
            return get(self, *args, assistant_model=assistant_model, **options)
        input_ids = options["input_ids"]
        if len(input_ids) > 1:
            raise ValueError(
                f"assistant_model works with one prompt at a time in transformers, got {len(input_ids)}: pass one, or "
                "generate without it."
            )
        if input_ids.shape[1] == 0:
            raise ValueError("assistant_model needs a prompt of token ids: pass input_ids with at least one token.")
        cache = options["model_kwargs"].get("past_key_values")
        if cache is not None and cache.get_seq_length() > 0:
            # transformers 5.17 to 5.23 read the whole prompt again, after what the cache has.
            raise ValueError("assistant_model cannot continue a cache of earlier tokens: leave past_key_values out.")
        names = ("generation_config", "input_ids", "model_kwargs")
        return getattr(assistant_model, _METHOD)(
            self, *(options[name] for name in names), options.get("target_tokenizer")
        )

    return get_candidate_generator


def _check(mode: Any, config: Any, options: dict[str, Any]) -> None:
    """Raise ValueError for what assisted generation cannot do."""
    if mode != "assisted_generation":
        raise ValueError(
            f"assistant_model works with greedy search and sampling, not with {getattr(mode, 'value', mode)}: leave "
            "out num_beams and other settings of the search, or the assistant."
        )
    if (config.num_return_sequences or 1) > 1:
        raise ValueError(
            f"assistant_model works with one text at a time, got num_return_sequences={config.num_return_sequences}: "
            "leave it out and call generate several times."
        )
    if getattr(config, "assistant_ensemble_weight", None) is not None:  # transformers 5.23
        raise ValueError("assistant_ensemble_weight changes the distribution of the text: leave it out.")
    if options.get("assistant_tokenizer") is not None:
        raise ValueError(
            "the assistant must have the token ids of the model, so assistant_tokenizer has no use: leave it out, with "
            "an assistant that was trained with the tokenizer of the model."
        )
