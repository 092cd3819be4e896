"""Loading models from directories, with one clear line when a directory is not what it should be."""

import json
import os
import re
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from calm.models.modeling_autoencoder import CalmAutoencoder
from calm.models.modeling_calm import CalmForCausalLM

HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


def load_autoencoder(path: str | os.PathLike) -> CalmAutoencoder:
    """The autoencoder of a directory or hub id: one saved alone, or the one inside a language model."""
    model = load_model(path)
    if isinstance(model, CalmForCausalLM):
        return model.autoencoder
    if not isinstance(model, CalmAutoencoder):
        raise ValueError(f"{path} holds a {type(model).__name__}, not an autoencoder.")
    return model


def load_language_model(path: str | os.PathLike) -> PreTrainedModel:
    """A CALM or a token model of a directory or hub id."""
    model = load_model(path)
    if isinstance(model, CalmAutoencoder):
        raise ValueError(f"{path} holds an autoencoder; a language model is needed (`stage: calm` or `baseline`).")
    return model


def load_model(path: str | os.PathLike) -> PreTrainedModel:
    """Whatever model a directory or hub id holds, in evaluation mode.

    Raises ValueError when a file is missing, damaged, or does not match its configuration.
    """
    directory = Path(path)
    if directory.exists() and not (directory / "config.json").is_file():
        raise ValueError(f"no model in {path}: config.json is missing.")
    if not directory.exists() and not HUB_ID.fullmatch(os.fspath(path)):
        raise ValueError(f"no model at {path}: there is no such directory.")
    try:
        config = AutoConfig.from_pretrained(path)
        kind: Any = CalmAutoencoder if config.model_type == "calm_autoencoder" else AutoModelForCausalLM
        model, info = kind.from_pretrained(path, output_loading_info=True)
    except SafetensorError as error:
        raise ValueError(f"the weights in {path} are damaged or cut short ({error}): copy them again.") from error
    except (json.JSONDecodeError, OSError) as error:
        raise ValueError(f"cannot load a model from {path}: {' '.join(str(error).split())}") from error
    missing = sorted(info["missing_keys"])
    if missing:
        shown = ", ".join(missing[:10]) + (f" and {len(missing) - 10} more" if len(missing) > 10 else "")
        raise ValueError(f"the weights in {path} lack {len(missing)} tensors: {shown}.")
    return model.eval()
