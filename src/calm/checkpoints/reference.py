"""The layout of the reference implementation's checkpoints, and ours: load and save either.

There, ``config.json`` is flat, the kind of model stands in ``architectures`` alone, the autoencoder of a language model
lies in a directory ``ae_path`` (and once more in the weights, under ``ae_model``), and some tensors have two names.
"""

import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from calm.checkpoints.hub import HUB_OPTIONS, check_weights, read_config, read_weights
from calm.checkpoints.reference_names import reference_names, replace_prefix
from calm.models.auto_classes import current_model_type
from calm.models.configuration_autoencoder import CalmAutoencoderConfig
from calm.models.configuration_calm import CalmConfig
from calm.models.heads.registry import find_head, reference_architectures

AUTOENCODER = "Autoencoder"
# Beside the names that count, the reference's output embedding and its energy head are stored under these.
_TIED_HEAD = "decoder.lm_head_weight"
_SECOND_HEAD, _FIRST_HEAD = "generative_head.", "mlp_generator."

_TOKEN_IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None}  # with the reference's defaults
_BACKBONE_FIELDS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps",
    "attention_bias", "attention_dropout", "mlp_bias",
)  # fmt: skip
_AUTOENCODER_FIELDS = (
    "vocab_size", "patch_size", "hidden_size", "intermediate_size", "latent_size", "num_encoder_layers",
    "num_decoder_layers", "hidden_act", "mlp_bias", "rms_norm_eps", "initializer_range", "kl_weight",
)  # fmt: skip
# The reference's configuration has these fields for every head.
_ENERGY_DEFAULTS = {"noise_size": 64, "beta": 1.0}
# Fields of a head that set how it is trained and sampled, and do not change what it computes.
_ONLY_TREATED_OTHERWISE = {f"head_config.{name}" for name in ("num_target_samples", "num_sampling_steps", "solver")}

Model = TypeVar("Model", bound=PreTrainedModel)


def is_reference_layout(config: dict) -> bool:
    """Whether the fields of a ``config.json`` are the reference's."""
    architectures = config.get("architectures") or [""]
    if config.get("model_type") or not isinstance(architectures, list):
        return False
    return architectures[0] in (AUTOENCODER, *reference_architectures())


def load_pretrained(
    cls: type[Model],
    transformers_from_pretrained: Callable[..., Model],
    path: str | os.PathLike | None,
    *args: Any,
    autoencoder: Any = None,
    **kwargs: Any,
) -> Model:
    """``from_pretrained`` of our classes: transformers' for our layout, the reference's layout translated first.

    Args:
        cls: ``CalmAutoencoder`` or ``CalmForCausalLM``.
        transformers_from_pretrained: the method it inherits.
        autoencoder: of a language model of the reference; comes before the one in its weights, if there is one.

    Raises:
        ValueError: when the checkpoint is of another kind, or weights are missing, unknown or of another shape.
    """
    kwargs.pop("trust_remote_code", None)  # the classes are here; nothing in a checkpoint is run
    hub = {name: kwargs[name] for name in HUB_OPTIONS if name in kwargs}
    fields = {} if path is None or "config" in kwargs else read_config(path, **hub)
    if path is None or not is_reference_layout(fields):
        if autoencoder is not None:
            raise ValueError(f"{path} holds its autoencoder: pass autoencoder= for checkpoints of the reference alone.")
        kind = current_model_type(fields.get("model_type"))
        wanted = cls.config_class.model_type  # type: ignore[union-attr]
        if kind is not None and kind != wanted:
            raise ValueError(f"{path} holds a model of type {kind!r}; {cls.__name__} loads type {wanted!r} alone.")
        return transformers_from_pretrained(path, *args, trust_remote_code=False, **kwargs)
    architecture = fields["architectures"][0]
    if (architecture == AUTOENCODER) != (cls.config_class is CalmAutoencoderConfig):
        kind = "an autoencoder" if architecture == AUTOENCODER else "a language model"
        raise ValueError(f"{path} holds {kind} ({architecture}); {cls.__name__} cannot load it.")
    config, state = _translate(path, fields, read_weights(path, **hub), autoencoder)
    _check(cls, path, config, state)
    others = {name: value for name, value in kwargs.items() if name not in hub}
    return transformers_from_pretrained(None, *args, config=config, state_dict=state, trust_remote_code=False, **others)


def _translate(
    path: str | os.PathLike, fields: dict, theirs: dict[str, Tensor], autoencoder: Any
) -> tuple[CalmAutoencoderConfig | CalmConfig, dict[str, Tensor]]:
    """Our configuration, and the tensors under our names."""
    if fields["architectures"][0] == AUTOENCODER:
        alone = autoencoder_config(fields)
        return alone, _rename(path, theirs, alone)
    if autoencoder is None:
        config = language_model_config(fields, _inner_autoencoder_config(path, fields, theirs))
        return config, _rename(path, theirs, config)
    config = language_model_config(fields, autoencoder.config)
    theirs = {name: tensor for name, tensor in theirs.items() if not name.startswith("ae_model.")}
    inner = {f"autoencoder.{name}": tensor for name, tensor in autoencoder.state_dict().items()}
    return config, _rename(path, theirs, config) | inner


def _check(cls: type[Model], path: str | os.PathLike, config: Any, state: dict[str, Tensor]) -> None:
    """ValueError, in the names that stand in the files, when tensors do not fit the configuration."""
    with torch.device("meta"):
        expected = {name: tensor.shape for name, tensor in cls(config).state_dict().items()}
    names = reference_names(config)
    check_weights(
        path,
        sorted(replace_prefix(name, names) for name in expected.keys() - state.keys()),
        sorted(state.keys() - expected.keys()),
        [
            (replace_prefix(name, names), state[name].shape, shape)
            for name, shape in expected.items()
            if name in state and state[name].shape != shape
        ],
    )


def reference_config(path: str | os.PathLike, fields: dict) -> CalmAutoencoderConfig | CalmConfig:
    """Our configuration of a checkpoint; the weights are opened, but not read, where it hangs on their shapes."""
    if fields["architectures"][0] == AUTOENCODER:
        return autoencoder_config(fields)
    ae_path = fields.get("ae_path")
    known = ae_path and (Path(ae_path) / "config.json").is_file()
    return language_model_config(fields, _inner_autoencoder_config(path, fields, {} if known else read_weights(path)))


def autoencoder_config(config: dict) -> CalmAutoencoderConfig:
    """Our configuration of an autoencoder from the reference's flat fields."""
    fields = {name: config[name] for name in _AUTOENCODER_FIELDS if name in config}
    dropout = config.get("ae_dropout", 0.15)
    return CalmAutoencoderConfig(
        **fields,
        token_dropout=dropout,
        latent_dropout=dropout,
        kl_clip=config.get("kl_clamp", 0.5),
        **_token_ids(config),
    )


def language_model_config(config: dict, autoencoder: CalmAutoencoderConfig) -> CalmConfig:
    """Our configuration of a language model from the reference's flat fields, around an autoencoder's.

    Raises ValueError when the two disagree.
    """
    for name in ("patch_size", "latent_size", "vocab_size"):
        if name in config and config[name] != getattr(autoencoder, name):
            raise ValueError(
                f"the language model was trained with {name} {config[name]}, but its autoencoder has "
                f"{getattr(autoencoder, name)}: they do not belong together."
            )
    head_type = reference_architectures()[config["architectures"][0]]
    fields = find_head(head_type).reference_fields
    head: dict[str, Any] = {ours: config.get(theirs, default) for ours, (theirs, default) in fields.items()}
    backbone = {name: config[name] for name in _BACKBONE_FIELDS if name in config}
    backbone["rope_theta"] = config.get("rope_theta", 10000.0)
    if config.get("rope_scaling"):
        backbone["rope_scaling"] = config["rope_scaling"]
    return CalmConfig(
        backbone_config=backbone | _token_ids(config),
        autoencoder_config=autoencoder,
        head_config={"type": head_type} | head,
        initializer_range=config.get("initializer_range", 0.02),
        # Its training text has the begin-of-text token in front of every document, and nothing behind.
        document_separator_id=_token_ids(config)["bos_token_id"],
        **_token_ids(config),
    )


def save_reference(model: Any, path: str | os.PathLike, final_path: str | os.PathLike | None = None) -> None:
    """Write a model as the reference code loads it; a language model's autoencoder goes to ``path/autoencoder``.

    Args:
        final_path: where the directory will stand, if it is moved afterwards: the reference finds the autoencoder by
            an absolute path.

    Raises:
        ValueError: when the model has something that the reference does not know.
    """
    path = Path(path)
    config: Any = model.config
    is_autoencoder = isinstance(config, CalmAutoencoderConfig)
    if not is_autoencoder:
        _check_head_is_known(config.head_config.type)
    inner = config if is_autoencoder else config.autoencoder_config
    if inner.embedding_size != inner.hidden_size:
        raise ValueError(
            "the reference's autoencoder has no embedding_size of its own: this model cannot be converted."
        )
    if is_autoencoder:
        _write(path, _reference_autoencoder_fields(config), _their_state(model))
        return
    backbone, head = config.backbone_config, config.head_config
    head_class = find_head(head.type)
    if backbone.model_type != "llama":
        raise ValueError(f"the reference knows Llama backbones only, this one is {backbone.model_type!r}.")
    fields = {name: getattr(backbone, name) for name in _BACKBONE_FIELDS}
    rope = dict(backbone.rope_parameters)
    fields |= {
        "architectures": [head_class.reference_architecture],
        "ae_path": str((Path(final_path or path) / "autoencoder").resolve()),
        "patch_size": config.patch_size,
        "latent_size": config.autoencoder_config.latent_size,
        **_ENERGY_DEFAULTS,
        **{theirs: getattr(head, ours) for ours, (theirs, _) in head_class.reference_fields.items()},
        "rope_theta": rope.pop("rope_theta"),
        "rope_scaling": None if rope.get("rope_type") == "default" else {**rope, "type": rope["rope_type"]},
        "pretraining_tp": 1,
        "use_cache": True,
    }
    _check_representable(config, fields)
    save_reference(model.autoencoder, path / "autoencoder")
    _write(path, fields | _shared_fields(model), _their_state(model))


def _check_head_is_known(head_type: str) -> None:
    """Raise ValueError for a head that the reference implementation does not have."""
    known = reference_architectures().values()
    if head_type not in known:
        raise ValueError(
            f"the reference implementation has no {head_type} head, only {', '.join(known)}: this model cannot be "
            "converted to its layout."
        )


def _token_ids(config: dict) -> dict:
    return {name: config.get(name, default) for name, default in _TOKEN_IDS.items()}


def _shared_fields(model: PreTrainedModel) -> dict:
    ids = {name: getattr(model.config, name) for name in _TOKEN_IDS}
    return ids | {"tie_word_embeddings": False, "torch_dtype": str(model.dtype).removeprefix("torch.")}


def _reference_autoencoder_fields(config: CalmAutoencoderConfig) -> dict:
    if config.token_dropout != config.latent_dropout or config.token_dropout_id != 0:
        warnings.warn(
            "the reference has one dropout rate for tokens and latents and drops to token 0: training the converted "
            "autoencoder further would differ. Its outputs do not.",
            stacklevel=3,
        )
    fields = {name: getattr(config, name) for name in (*_AUTOENCODER_FIELDS, *_TOKEN_IDS)}
    return fields | {
        "architectures": [AUTOENCODER],
        "ae_dropout": config.token_dropout,
        "kl_clamp": config.kl_clip,
        "max_position_embeddings": 2048,
        "pretraining_tp": 1,
        "tie_word_embeddings": False,
    }


def _check_representable(config: CalmConfig, fields: dict) -> None:
    """ValueError where the reference would read another model from the fields; a warning where it only treats it
    otherwise."""
    theirs: Any = language_model_config(fields, config.autoencoder_config)
    ours = config.head_config.to_dict() | {"hidden_size": config.head_config.hidden_size or config.hidden_size}
    back = theirs.head_config.to_dict() | {"hidden_size": theirs.hidden_size}
    lost: dict[str, tuple[Any, ...]] = {
        f"head_config.{name}": (value, back[name]) for name, value in ours.items() if value != back[name]
    }
    head_dims = tuple(getattr(each.backbone_config, "head_dim", None) for each in (config, theirs))
    if head_dims[0] != head_dims[1]:
        lost["backbone_config.head_dim"] = head_dims
    told = "; ".join(f"{name} {theirs!r} there, {ours!r} here" for name, (ours, theirs) in lost.items())
    if lost.keys() - _ONLY_TREATED_OTHERWISE:
        raise ValueError(f"the reference has no room for what this model is: {told}. It cannot be converted.")
    if lost:
        warnings.warn(f"the reference trains and samples in its own way: {told}.", stacklevel=3)


def _write(path: Path, fields: dict, state: dict[str, Tensor]) -> None:
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(fields, indent=2, sort_keys=True), encoding="utf-8")
    torch.save(state, path / "pytorch_model.bin")


def _inner_autoencoder_config(path: str | os.PathLike, config: dict, state: dict[str, Tensor]) -> CalmAutoencoderConfig:
    """Of the autoencoder inside a language model: from ``ae_path`` where that exists, else from its weights' shapes."""
    ae_path = config.get("ae_path")
    if ae_path and (Path(ae_path) / "config.json").is_file():
        return autoencoder_config(read_config(ae_path))
    inner = {name.removeprefix("ae_model."): tensor for name, tensor in state.items() if name.startswith("ae_model.")}
    if not inner:
        raise ValueError(
            f"the weights in {path} hold no autoencoder (no ae_model.*), and there is none at its ae_path {ae_path!r}: "
            "pass it as autoencoder=, or put both into one directory with `calm convert ... --autoencoder ...`."
        )
    try:
        vocab_size, hidden_size = inner["encoder.embed_tokens.weight"].shape
        return CalmAutoencoderConfig(
            vocab_size=vocab_size,
            hidden_size=hidden_size,
            intermediate_size=inner["encoder.encoder_layers.0.mlp.gate_proj.weight"].shape[0],
            patch_size=inner["encoder.squeeze_layer.weight"].shape[1] // hidden_size,
            latent_size=inner["encoder.hidden_to_latent.weight"].shape[0] // 2,
            num_encoder_layers=_num_layers(inner, "encoder.encoder_layers."),
            num_decoder_layers=_num_layers(inner, "decoder.decoder_layers."),
            mlp_bias="encoder.encoder_layers.0.mlp.gate_proj.bias" in inner,
            **_token_ids(config),
        )
    except KeyError as error:
        raise ValueError(f"the weights in {path} lack ae_model.{error.args[0]}: copy the checkpoint again.") from error


def _num_layers(state: dict[str, Tensor], prefix: str) -> int:
    return 1 + max((int(name[len(prefix) :].split(".")[0]) for name in state if name.startswith(prefix)), default=0)


def _rename(path: str | os.PathLike, theirs: dict[str, Tensor], config: CalmAutoencoderConfig | CalmConfig) -> dict:
    """Tensors under our names, each once; a name that is not the reference's stays."""
    is_autoencoder = isinstance(config, CalmAutoencoderConfig)
    prefix = "" if is_autoencoder else "ae_model."
    theirs = dict(theirs)
    # Where both stand, they must agree: with us they are one tensor. One alone is as good as the other.
    twins = [(prefix + _TIED_HEAD, f"{prefix}encoder.embed_tokens.weight")]
    names = {their: our for our, their in reference_names(config).items()}
    if any(name.startswith(_FIRST_HEAD) for name in names):
        twins += [
            (name, _FIRST_HEAD + name.removeprefix(_SECOND_HEAD)) for name in theirs if name.startswith(_SECOND_HEAD)
        ]
    for second, first in twins:
        if second in theirs:
            copy = theirs.pop(second)
            if not torch.equal(theirs.setdefault(first, copy), copy):
                raise ValueError(f"{second} and {first} in {path} must be equal (they are one tensor), but differ.")
    return {replace_prefix(name, names): tensor for name, tensor in theirs.items()}


def _their_state(model: PreTrainedModel) -> dict[str, Tensor]:
    """A model's tensors under the reference's names, those with two names twice."""
    config: Any = model.config
    names = reference_names(config)
    if hasattr(model, "mtp_head"):
        warnings.warn(
            "the reference has no MTP head: it is left out, and with it sampler=mtp.",
            stacklevel=3,
        )
    ours = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("mtp_head.")}
    state = {replace_prefix(name, names): tensor.contiguous() for name, tensor in ours.items()}
    prefix = "" if isinstance(config, CalmAutoencoderConfig) else "ae_model."
    state[prefix + _TIED_HEAD] = state[f"{prefix}encoder.embed_tokens.weight"]
    heads = {name: tensor for name, tensor in state.items() if name.startswith(_FIRST_HEAD)}
    return state | {_SECOND_HEAD + name.removeprefix(_FIRST_HEAD): tensor for name, tensor in heads.items()}
