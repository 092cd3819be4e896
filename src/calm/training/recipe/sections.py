"""The sections of a recipe as dataclasses: ``data``, and ``model`` per stage and for fine-tuning.

The help text of every key is in the metadata of its field; :mod:`calm.training.recipe.reference` prints them.
"""

import dataclasses
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any, Literal

from calm.training.recipe.checks import check_keys, check_part

STAGES = ("autoencoder", "calm", "baseline")
_PATHS = ("autoencoder", "backbone_weights", "pretrained")


def key_names(section: Any) -> set[str]:
    """Return the keys of a section."""
    return {each.name for each in dataclasses.fields(section)}


def given_keys(section: Any) -> dict[str, Any]:
    """Return a section as a mapping for YAML: the keys that have a value."""
    return {name: value for name, value in dataclasses.asdict(section).items() if value is not None}


@dataclass
class DataSection:
    """Key ``data``: prepared data of ``calm prepare``."""

    train: str = field(metadata={"help": "directory of prepared training data"})
    block_size: int = field(metadata={"help": "tokens per block; a multiple of the patch size"})
    validation: str | None = field(
        default=None, metadata={"help": "directory of prepared data whose loss is logged every training.eval_steps"}
    )


@dataclass
class CodesSection:
    """Key ``model.autoencoder`` as a mapping: token codes instead of a trained autoencoder."""

    type: Literal["codes"] = field(metadata={"help": "codes"})
    patch_size: int = field(metadata={"help": "K, tokens per patch"})
    code_size: int | None = field(default=None, metadata={"help": "d, dimensions of the code of a token; default 32"})
    code_seed: int | None = field(default=None, metadata={"help": "seed of the random codes; default 0"})
    vocab_size: int | None = field(default=None, metadata={"help": "V; default that of the data"})


@dataclass
class AutoencoderModel:
    """Key ``model`` of stage autoencoder: the fields of CalmAutoencoderConfig."""

    config: dict[str, Any]


@dataclass
class BaselineModel:
    """Key ``model`` of stage baseline: an autoregressive token model."""

    backbone: dict[str, Any] = field(
        metadata={"help": "fields of the model's transformers configuration; model_type if it is not llama"}
    )


@dataclass
class CalmModel:
    """Key ``model`` of stage calm."""

    autoencoder: str | CodesSection = field(
        metadata={"help": "directory or hub id of a trained autoencoder, or a mapping of token codes"}
    )
    backbone: dict[str, Any] = field(
        metadata={"help": "fields of the backbone's transformers configuration; model_type if it is not llama"}
    )
    head: dict[str, Any] | None = field(
        default=None, metadata={"help": "type of the head (default energy) and fields of its configuration"}
    )
    mtp_weight: float | None = field(
        default=None, metadata={"help": "weight of the cross-entropy of multi-token prediction; default 0, no MTP head"}
    )
    mtp_type: str | None = field(
        default=None,
        metadata={
            "help": "independent, or autoregressive: every token is also predicted from those before it in its patch"
        },
    )
    decoded_brier_weight: float | None = field(
        default=None, metadata={"help": "weight of the decoded-token Brier loss; default 0"}
    )
    backbone_weights: str | None = field(
        default=None,
        metadata={
            "help": "directory or hub id of a token model or CALM of the same shape, whose backbone is the start"
        },
    )
    freeze_backbone: bool | None = field(
        default=None,
        metadata={
            "help": "whether only the head, and what has no trained weights, are trained; backbone_weights of a CALM"
        },
    )


@dataclass
class FineTunedModel:
    """Key ``model`` when the training starts from a trained model; all keys but the first are for stage calm."""

    pretrained: str = field(metadata={"help": "directory or hub id of the trained model"})
    autoencoder: str | None = field(
        default=None, metadata={"help": "directory or hub id of the autoencoder of a released model that has none"}
    )
    freeze_backbone: bool | None = field(
        default=None, metadata={"help": "whether only the head, and a new MTP head, are trained"}
    )
    mtp_weight: float | None = field(
        default=None, metadata={"help": "adds an MTP head to a model that has none, with this weight of its loss"}
    )
    mtp_type: str | None = field(default=None, metadata={"help": "type of the added MTP head"})
    decoded_brier_weight: float | None = field(
        default=None, metadata={"help": "weight of the decoded-token Brier loss; default the model's"}
    )


ModelSection = AutoencoderModel | BaselineModel | CalmModel | FineTunedModel


def model_keys(stage: str) -> Collection[str]:
    """Return the keys that ``model`` may have in a recipe of this stage."""
    from calm.models.configuration_autoencoder import CalmAutoencoderConfig

    if stage == "autoencoder":
        return key_names(CalmAutoencoderConfig) | {"pretrained"}
    if stage == "baseline":
        return key_names(BaselineModel) | {"pretrained"}
    return key_names(CalmModel) | key_names(FineTunedModel)


def is_codes(model: dict[str, Any], name: str = "autoencoder") -> bool:
    """Return whether the mapping of a recipe's ``model`` has token codes instead of a trained autoencoder."""
    return name == "autoencoder" and isinstance(model.get(name), dict)


def read_model(stage: str, given: Any) -> ModelSection:
    """Return the section of a mapping.

    Raises:
        ValueError: when a key is unknown, missing or has a value of the wrong type; the message names the remedy.
    """
    check_keys(given, model_keys(stage), "model")
    codes = _read_codes(given["autoencoder"]) if is_codes(given) and stage == "calm" else None
    for name in _PATHS:
        if name in given and not isinstance(given[name], str) and not is_codes(given, name):
            raise ValueError(f"model.{name} must name a directory or hub id, got {given[name]!r}.")
    for part in ("backbone", "head"):
        if given.get(part) is not None:
            check_part(part, given[part])
    freeze = given.get("freeze_backbone", False)
    if not isinstance(freeze, bool):
        raise ValueError(f"model.freeze_backbone must be true or false, got {freeze!r}.")
    if freeze and not {"pretrained", "backbone_weights"} & given.keys():
        raise ValueError(
            "model.freeze_backbone is for a backbone that was trained: give model.backbone_weights or "
            "model.pretrained too."
        )
    if "pretrained" in given:
        return _read_fine_tuned(stage, given)
    if stage == "autoencoder":
        return AutoencoderModel(dict(given))
    if not given.get("backbone"):
        raise ValueError(f"stage {stage} needs model.backbone: at least its hidden_size and num_hidden_layers.")
    if stage == "baseline":
        return BaselineModel(**given)
    if "autoencoder" not in given:
        raise ValueError(
            "stage calm needs model.autoencoder: the directory of a trained autoencoder, or {type: codes, patch_size: "
            "4, code_size: 32} for a categorical_flow head."
        )
    return CalmModel(**given | ({} if codes is None else {"autoencoder": codes}))


def _read_fine_tuned(stage: str, given: dict[str, Any]) -> FineTunedModel:
    if "mtp_type" in given and "mtp_weight" not in given:
        raise ValueError("model.mtp_type needs a model.mtp_weight beside it.")
    allowed = key_names(FineTunedModel) if stage == "calm" else {"pretrained"}
    if beside := given.keys() - allowed:
        raise ValueError(
            f"model.pretrained says all there is to say about the model; leave out {', '.join(sorted(beside))}."
        )
    return FineTunedModel(**given)


def _read_codes(given: dict[str, Any]) -> CodesSection:
    check_keys(given, key_names(CodesSection), "model.autoencoder")
    if given.get("type") != "codes":
        raise ValueError(
            "model.autoencoder must name a directory or hub id, or be a mapping with type: codes, patch_size and "
            f"code_size, got {given!r}."
        )
    if "patch_size" not in given:
        raise ValueError("model.autoencoder lacks 'patch_size': K, the tokens per vector.")
    for name in ("patch_size", "code_size"):
        value = given.get(name, 1)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"model.autoencoder.{name} must be a whole number, at least 1, got {value!r}.")
    return CodesSection(**given)
