"""Loading whatever model a directory or hub id holds, with one clear line when it is not what it should be."""

import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, PreTrainedModel

from calm.models.hub import check_json, check_weights, read_config
from calm.models.modeling_autoencoder import CalmAutoencoder
from calm.models.modeling_calm import CalmForCausalLM
from calm.models.released import AUTOENCODER, is_reference_layout


def load_autoencoder(path: str | os.PathLike, dtype: torch.dtype | None = None) -> CalmAutoencoder:
    """The autoencoder of a directory or hub id: one saved alone, or the one inside a language model."""
    model = load_model(path, dtype)
    if isinstance(model, CalmForCausalLM):
        return model.autoencoder
    if not isinstance(model, CalmAutoencoder):
        raise ValueError(f"{path} holds a {type(model).__name__}, not an autoencoder.")
    return model


def load_language_model(
    path: str | os.PathLike, dtype: torch.dtype | None = None, autoencoder: CalmAutoencoder | None = None
) -> PreTrainedModel:
    """A CALM or a token model of a directory or hub id."""
    model = load_model(path, dtype, autoencoder)
    if isinstance(model, CalmAutoencoder):
        raise ValueError(f"{path} holds an autoencoder; a language model is needed (`stage: calm` or `baseline`).")
    return model


def load_model(
    path: str | os.PathLike, dtype: torch.dtype | None = None, autoencoder: CalmAutoencoder | None = None
) -> PreTrainedModel:
    """Whatever model a directory or hub id holds, ours or the reference's, in evaluation mode.

    Args:
        dtype: of the weights; default as they are saved.
        autoencoder: for a language model of the reference that comes without one.

    Raises ValueError when a file is missing, damaged, or does not match its configuration.
    """
    kind = model_class(path)
    check_json(Path(path) / "generation_config.json")
    arguments: dict[str, Any] = {"output_loading_info": True, "ignore_mismatched_sizes": True}
    if dtype is not None:
        arguments["dtype"] = dtype
    if autoencoder is not None:
        arguments["autoencoder"] = autoencoder
    try:
        model, info = kind.from_pretrained(path, **arguments)
    except SafetensorError as error:
        raise ValueError(f"the weights in {path} are damaged or cut short ({error}): copy them again.") from error
    except OSError as error:
        raise ValueError(f"cannot load a model from {path}: {' '.join(str(error).split())}") from error
    ours = isinstance(model, CalmAutoencoder | CalmForCausalLM)
    unexpected = sorted(info["unexpected_keys"]) if ours else []
    check_weights(path, sorted(info["missing_keys"]), unexpected, sorted(info["mismatched_keys"]))
    return model.eval()


def model_class(path: str | os.PathLike) -> Any:
    """The class that loads a directory or hub id; ValueError when it holds no model."""
    try:
        config = read_config(path)
    except OSError as error:
        raise ValueError(str(error)) from error
    if is_reference_layout(config):
        return CalmAutoencoder if config["architectures"][0] == AUTOENCODER else CalmForCausalLM
    return {"calm_autoencoder": CalmAutoencoder, "calm": CalmForCausalLM}.get(
        config.get("model_type", ""), AutoModelForCausalLM
    )
