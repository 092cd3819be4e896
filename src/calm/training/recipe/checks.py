"""What a recipe may say: every check raises ValueError that names the key, what was given, and what is allowed."""

import dataclasses
import difflib
from collections.abc import Callable, Collection, Mapping
from typing import Any, get_args

from calm.utils.deprecation import REMOVED_ENERGY_FIELDS, RENAMED_CALM_FIELDS, drop_removed, rename_deprecated

# Set by the run itself, at odds with going on where it was, or without effect on how these models are trained.
_RESERVED_TRAINING = (
    "output_dir", "seed", "remove_unused_columns", "prediction_loss_only", "logging_nan_inf_filter", "save_only_model",
    "data_seed", "train_sampling_strategy", "ignore_data_skip", "resume_from_checkpoint", "auto_find_batch_size",
    "label_smoothing_factor", "label_names", "average_tokens_across_devices", "do_train", "do_eval", "do_predict",
)  # fmt: skip
_SMALLEST_TRAINING = {
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "dataloader_num_workers": 0,
    "save_total_limit": 1,
    "learning_rate": 0,
    "weight_decay": 0,
    "warmup_steps": 0,
    "max_grad_norm": 0,
    "max_steps": -1,
}
# Numbers of steps, or shares of the run below 1.
_INTERVALS = ("logging_steps", "save_steps", "eval_steps")

# Of backbones and heads; what else they count may be nothing, or a list.
_SIZES = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "vocab_size",
)  # fmt: skip


def check_keys(
    given: Any,
    allowed: Collection[str],
    where: str,
    elsewhere: Callable[[], Mapping[str, Collection[str]]] | None = None,
) -> None:
    """ValueError that names a key which is not allowed, and the nearest one that is.

    Args:
        elsewhere: returns the keys of other sections by section; one that has the key is suggested.
    """
    if not isinstance(given, dict):
        raise ValueError(f"{where} must be a mapping of keys, got {given!r}.")
    for key in given:
        if key not in allowed:
            sections = () if elsewhere is None else elsewhere().items()
            near = [f"{section}.{key}" for section, keys in sections if key in keys][:1]
            near = near or difflib.get_close_matches(str(key), allowed, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"allowed: {', '.join(sorted(allowed))}."
            raise ValueError(f"unknown key {key!r} in {where}: {hint}")


def with_current_keys(values: dict[str, Any], warn: bool = True) -> dict[str, Any]:
    """Return a recipe with former keys replaced by their present names, and without those that were removed.

    Args:
        warn: whether to warn of former keys; recipes that an earlier release wrote are translated without a warning.
    """
    values = dict(values)
    drop_removed(values, {"distillation": None}, "the recipe")
    if isinstance(values.get("model"), dict):
        values["model"] = model = dict(values["model"])
        rename_deprecated(model, RENAMED_CALM_FIELDS, "model", warn)
        if isinstance(model.get("head"), dict):
            model["head"] = dict(model["head"])
            drop_removed(model["head"], REMOVED_ENERGY_FIELDS, "model.head")
    return values


def check_types(values: Any, types: dict[str, type], where: str) -> None:
    for name, kind in types.items():
        value = getattr(values, name)
        if not isinstance(value, kind) or isinstance(value, bool):
            raise ValueError(f"{name} in {where} must be of type {kind.__name__}, got {value!r}; quote a text.")


def check_smallest(name: str, value: Any, smallest: float) -> None:
    if value is not None and value < smallest:
        raise ValueError(f"{name} must be at least {smallest}, got {value!r}.")


def check_training(training: Any) -> None:
    """Fields of transformers' TrainingArguments, of the types these have."""
    known = _training_types()
    given = training if isinstance(training, dict) else {}
    if reserved := [name for name in _RESERVED_TRAINING if name in given]:
        raise ValueError(f"training.{reserved[0]} has no place in a recipe: a run decides it, or would not heed it.")
    check_keys(training, training_fields(), "training")
    for name, value in training.items():
        _check_setting(f"training.{name}", value, known[name])
    for name, smallest in _SMALLEST_TRAINING.items():
        check_smallest(f"training.{name}", training.get(name), smallest)
    for name in _INTERVALS:
        if training.get(name) is not None and not training[name] > 0:
            raise ValueError(f"training.{name} must be above 0, got {training[name]!r}.")
    if training.get("max_steps") == 0:
        raise ValueError("training.max_steps must be at least 1, or -1 for as many as training.num_train_epochs takes.")


def _training_types() -> dict[str, Any]:
    from transformers import TrainingArguments

    return {each.name: each.type for each in dataclasses.fields(TrainingArguments) if each.init}


def training_fields() -> Collection[str]:
    """The keys that ``training`` may have."""
    return _training_types().keys() - set(_RESERVED_TRAINING)


def _check_setting(name: str, value: Any, kind: Any) -> None:
    """Check numbers, truth values and lists of plain values; what else a setting may be, transformers checks."""
    if isinstance(value, list) and any(isinstance(part, list | dict) for part in value):
        raise ValueError(
            f"{name} must be a value or a list of values, got a list of {type(value[0]).__name__}: {value!r:.100}."
        )
    if isinstance(value, dict) and "dict" not in str(kind):
        raise ValueError(f"{name} must be a value, got a mapping: {value!r:.100}.")
    kinds = set(get_args(kind) or (kind,))
    if type(None) in kinds and value is None:
        return
    kinds -= {type(None)}
    if kinds == {bool} and not isinstance(value, bool):
        raise ValueError(f"{name} must be true or false, got {value!r}.")
    if kinds in ({int}, {float}) and (not isinstance(value, int | float) or isinstance(value, bool)):
        raise ValueError(f"{name} must be a number, got {value!r}.")
    if kinds == {int} and not isinstance(value, int):
        raise ValueError(f"{name} must be a number without fraction, got {value!r}.")


def check_part(part: str, given: Any) -> None:
    """Raise ValueError when ``model.backbone`` or ``model.head`` is not a mapping of fields that fit together."""
    if not isinstance(given, dict):
        raise ValueError(f"model.{part} must be a mapping of its configuration's fields, got {given!r}.")
    fields = _backbone_fields(given) if part == "backbone" else _head_fields(given)
    if fields is not None:
        check_keys(given, fields, f"model.{part}")
    for name in _SIZES:
        value = given.get(name)
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise ValueError(f"model.{part}.{name} must be a whole number, at least 1, got {value!r}.")
    if part == "backbone":
        _check_heads(given)


def _check_heads(backbone: dict[str, Any]) -> None:
    """What is given and what follows from the defaults of the backbone's family."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    defaults = CONFIG_MAPPING[backbone.get("model_type", "llama")]
    heads = backbone.get("num_attention_heads", getattr(defaults, "num_attention_heads", None))
    shared = backbone.get("num_key_value_heads", getattr(defaults, "num_key_value_heads", None))
    if isinstance(heads, int) and isinstance(shared, int) and heads % shared:
        raise ValueError(
            f"model.backbone.num_key_value_heads ({shared}) must divide num_attention_heads ({heads}): each serves as "
            "many of them."
        )


def _backbone_fields(backbone: dict[str, Any]) -> Collection[str] | None:
    """Fields of the backbone's configuration; None where a family does not say which there are."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kind = backbone.get("model_type", "llama")
    if kind not in CONFIG_MAPPING:
        near = difflib.get_close_matches(str(kind), list(CONFIG_MAPPING), n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else "it must be one that transformers knows."
        raise ValueError(f"model.backbone.model_type {kind!r} is unknown: {hint}")
    config: Any = CONFIG_MAPPING[kind]
    if not dataclasses.is_dataclass(config):
        return None
    fields = {each.name for each in dataclasses.fields(config)}
    return fields | set(getattr(config, "attribute_map", None) or ()) | {"model_type", "rope_theta"}


def _head_fields(head: dict[str, Any]) -> Collection[str] | None:
    """Fields of the head's configuration; an unknown type of head is named when the model is built."""
    from calm.models.heads.registry import find_head

    try:
        config = find_head(head.get("type", "energy"), "model.head.type").config_class
    except ValueError:
        return None
    return {each.name for each in dataclasses.fields(config)}
