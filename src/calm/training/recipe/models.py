"""The model of a recipe: built with weights for a run, or as an outline without."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from calm.checkpoints.loading import load_autoencoder, load_language_model, load_model
from calm.checkpoints.meta_model import outline, settings_may_not_fit
from calm.data.blocks import MANIFEST, read_manifest
from calm.data.tokenizer import load_tokenizer, tokenizer_hash
from calm.models.configuration_autoencoder import CalmAutoencoderConfig
from calm.models.configuration_calm import AUXILIARY, CalmConfig
from calm.models.configuration_codes import TokenCodesConfig
from calm.models.limits import check_sizes
from calm.models.modeling_autoencoder import CalmAutoencoder
from calm.models.modeling_calm import CalmForCausalLM
from calm.models.modeling_codes import TokenCodes
from calm.training.loop.token_loss import use_linear_cross_entropy
from calm.training.recipe.recipe import Recipe
from calm.training.recipe.sections import (
    AutoencoderModel,
    BaselineModel,
    CalmModel,
    CodesSection,
    FineTunedModel,
    given_keys,
)

_BACKBONE = "the settings in model.backbone"


def build_model(recipe: Recipe) -> PreTrainedModel:
    """The recipe's model for the recipe's data: freshly initialised, or as far as it was trained already."""
    tokens = _token_ids(recipe.data.train)
    section = recipe.model
    if isinstance(section, FineTunedModel):
        return _pretrained(recipe, section)
    if isinstance(section, AutoencoderModel):
        return CalmAutoencoder(CalmAutoencoderConfig(**tokens | section.config))
    if isinstance(section, BaselineModel):
        with settings_may_not_fit(_BACKBONE):
            model = AutoModelForCausalLM.from_config(
                _baseline_config(section, recipe, tokens), dtype=torch.float32, trust_remote_code=False
            )
        use_linear_cross_entropy(model)
        return model
    if isinstance(section.autoencoder, CodesSection):
        autoencoder: Any = TokenCodes(_codes_config(section.autoencoder, tokens))
        autoencoder.check_codes()
    else:
        with _named("model.autoencoder"):
            autoencoder = load_autoencoder(section.autoencoder)
        _check_same_tokenizer(section.autoencoder, recipe.data.train)
    backbone = _backbone(section, recipe, autoencoder.config.patch_size, tokens)
    with settings_may_not_fit(_BACKBONE):
        model = CalmForCausalLM.from_autoencoder(autoencoder, backbone, section.head, **_auxiliary(section))
    if section.backbone_weights is not None:
        with _named("model.backbone_weights"):
            _check_same_tokenizer(section.backbone_weights, recipe.data.train)
            taken = _load_backbone(model, section.backbone_weights)
        if section.freeze_backbone:
            if "patch_embedding" not in taken:
                raise ValueError(
                    f"model.freeze_backbone: {section.backbone_weights} holds a token model, whose backbone "
                    "has yet to learn to read patches; give backbone_weights of a CALM."
                )
            _freeze(model, taken)
    if read_manifest(recipe.data.train).get("separator") == "bos":
        model.config.document_separator_id = tokens["bos_token_id"]
    return model


@contextmanager
def _named(key: str) -> Iterator[None]:
    """Put the recipe's key before the message of a ValueError or OSError about the model that the key names."""
    try:
        yield
    except (ValueError, OSError) as error:
        message = str(error)
        raise ValueError(message if message.startswith(key) else f"{key}: {message}") from error


def _pretrained(recipe: Recipe, section: FineTunedModel) -> PreTrainedModel:
    """Load a trained model of the recipe's stage, in float32."""
    path = section.pretrained
    with _named("model.autoencoder"):
        autoencoder = load_autoencoder(section.autoencoder) if section.autoencoder else None
    with _named("model.pretrained"):
        model = load_model(path, torch.float32, autoencoder)
    stage = {CalmAutoencoder: "autoencoder", CalmForCausalLM: "calm"}.get(type(model), "baseline")
    if stage != recipe.stage:
        raise ValueError(f"model.pretrained: {path} holds a {type(model).__name__}, which is of stage {stage}.")
    _check_same_tokenizer(path, recipe.data.train)
    if stage == "baseline":
        use_linear_cross_entropy(model)
    elif isinstance(model, CalmForCausalLM):
        # Where the model takes documents to end, its texts end too.
        known = model.config.eos_token_id
        ends = {*(known if isinstance(known, list) else [known]), model.config.separator_id} - {None}
        model.generation_config.eos_token_id = sorted(ends)
        trained = [part for part in _PARTS if hasattr(model, part)]
        _set_losses(model, section)
        if section.freeze_backbone:
            _freeze(model, trained)
    return model.train()


def _set_losses(model: Any, section: FineTunedModel) -> None:
    """Set the losses of a trained model as the recipe gives them; ValueError where that does not fit."""
    if section.decoded_brier_weight is not None:
        model.config.decoded_brier_weight = section.decoded_brier_weight
        model.config.check_loss_weights()
    if section.mtp_weight is not None:
        model.add_mtp_head(section.mtp_weight, section.mtp_type or "independent")


_SAME_CONFIG = (
    "model_type", "num_attention_heads", "num_key_value_heads", "head_dim", "hidden_act", "rope_parameters",
)  # fmt: skip


# What gives the hidden states, and the read-outs of them that token prediction trains.
_PARTS = ("backbone", "patch_embedding", "mtp_head")


def _load_backbone(model: CalmForCausalLM, path: str) -> list[str]:
    """Take the weights of a token model's backbone, or of a CALM's with all that belongs to it, and say which parts.

    ValueError where the shapes differ.
    """
    source: Any = load_language_model(path, torch.float32)
    # What shapes do not show, and weights mean nothing without.
    if isinstance(source, CalmForCausalLM):
        config = source.config.backbone_config
        taken = [name for name in _PARTS if hasattr(source, name) and hasattr(model, name)]
        given = {name: getattr(source, name).state_dict() for name in taken}
        kinds = [each.config.mtp_type for each in (source, model)]
        if "mtp_head" in taken and kinds[0] != kinds[1]:
            raise ValueError(
                f"model.backbone_weights: the CALM in {path} has mtp_type {kinds[0]}, not {kinds[1]}; "
                "give model.mtp_type the same."
            )
        if source.config.patch_size != model.config.patch_size:
            raise ValueError(
                f"model.backbone_weights: the CALM in {path} has patches of {source.config.patch_size} tokens, not "
                f"{model.config.patch_size}."
            )
    else:
        config, taken, given = source.config, ["backbone"], {"backbone": source.base_model.state_dict()}
    for name in _SAME_CONFIG:
        theirs, ours = (getattr(each, name, None) for each in (config, model.backbone.config))
        if theirs != ours:
            raise ValueError(
                f"model.backbone_weights: the model in {path} has {name} {theirs}, model.backbone {ours}; give "
                "model.backbone the same."
            )
    for part in taken:
        module = getattr(model, part)
        _check_same_shapes(given[part], module.state_dict(), path)
        module.load_state_dict(given[part])
    return taken


def _check_same_shapes(given: dict[str, Tensor], wanted: dict[str, Tensor], path: str) -> None:
    differing = [name for name in wanted if name not in given or given[name].shape != wanted[name].shape]
    if differing or given.keys() - wanted.keys():
        name = (differing or sorted(given.keys() - wanted.keys()))[0]
        shapes = " and ".join(str(tuple(state[name].shape)) for state in (given, wanted) if name in state)
        raise ValueError(
            f"model.backbone_weights: the model in {path} has another shape than model.backbone ({name}: {shapes}); "
            "give model.backbone its sizes."
        )


def _freeze(model: CalmForCausalLM, parts: Iterable[str]) -> None:
    for name in parts:
        if hasattr(model, name):
            getattr(model, name).requires_grad_(False)


def outline_model(recipe: Recipe, others: Iterable[Recipe] = ()) -> PreTrainedModel:
    """The recipe's model without weights; neither its data nor its autoencoder need exist yet.

    Args:
        others: recipes that will train what this one builds on.

    Raises ValueError when the vocabulary or the autoencoder stand nowhere.
    """
    tokens = _token_ids(recipe.data.train) if (Path(recipe.data.train) / MANIFEST).is_file() else {}
    section = recipe.model
    if isinstance(section, FineTunedModel):
        with _named("model.pretrained"):
            model: Any = outline_at(section.pretrained, others)
        if isinstance(model, CalmForCausalLM):
            _set_losses(model, section)
        return model
    fields = section.config if isinstance(section, AutoencoderModel) else section.backbone
    if not tokens and "vocab_size" not in fields:
        raise ValueError(
            f"the data in {recipe.data.train} are not prepared yet, and the recipe of {recipe.output_dir} names no "
            f"vocab_size: prepare them, or name it (`calm info --vocab-size`, or "
            f"model.{'' if recipe.stage == 'autoencoder' else 'backbone.'}vocab_size in the recipe)."
        )
    if isinstance(section, AutoencoderModel):
        return outline(CalmAutoencoderConfig(**tokens | section.config))
    if isinstance(section, BaselineModel):
        with settings_may_not_fit(_BACKBONE):
            return outline(_baseline_config(section, recipe, tokens))
    if isinstance(section.autoencoder, CodesSection):
        autoencoder: Any = _codes_config(section.autoencoder, {"vocab_size": fields.get("vocab_size")} | tokens)
    else:
        with _named("model.autoencoder"):
            config: Any = outline_at(section.autoencoder, others).config
        autoencoder = getattr(config, "autoencoder_config", config)
    with settings_may_not_fit(_BACKBONE):
        return outline(
            CalmConfig(
                backbone_config=_backbone(section, recipe, autoencoder.patch_size, tokens),
                head_config=section.head,
                autoencoder_config=autoencoder,
                **_auxiliary(section),
            )
        )


def outline_at(place: str, recipes: Iterable[Recipe]) -> PreTrainedModel:
    """The model of a directory without its weights; where none is yet, that of the recipe that will put one there."""
    if (Path(place) / "config.json").is_file():
        return outline(place)
    for recipe in recipes:
        if recipe.output_dir == place:
            return outline_model(recipe, recipes)
    raise ValueError(f"there is no model in {place} yet, and none of the recipes at hand will train it.")


def _codes_config(section: CodesSection, tokens: dict) -> TokenCodesConfig:
    fields = given_keys(section)
    del fields["type"]
    return TokenCodesConfig(**tokens | fields)


def _baseline_config(section: BaselineModel, recipe: Recipe, tokens: dict) -> Any:
    fields = _backbone(section, recipe, 1, tokens)
    check_sizes(fields, "model.backbone.")
    return AutoConfig.for_model(fields.pop("model_type", "llama"), **fields)


def _backbone(section: BaselineModel | CalmModel, recipe: Recipe, patch_size: int, tokens: dict) -> dict:
    """Return the fields of the backbone's configuration; its context holds a block, a position per patch."""
    positions = max(2048, recipe.data.block_size // patch_size)
    return {"max_position_embeddings": positions} | tokens | dict(section.backbone)


def _auxiliary(section: CalmModel) -> dict:
    return {name: value for name, value in given_keys(section).items() if name in AUXILIARY}


def _token_ids(data: str) -> dict[str, int | None]:
    manifest = read_manifest(data)
    tokenizer = load_tokenizer(data)
    return {
        "vocab_size": manifest["vocab_size"],
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def _check_same_tokenizer(model: str, data: str) -> None:
    if tokenizer_hash(load_tokenizer(model)) != tokenizer_hash(load_tokenizer(data)):
        raise ValueError(
            f"the model in {model} and the data in {data} belong to different tokenizers: run `calm prepare "
            f"--tokenizer {model}`, or train a model on this data."
        )
