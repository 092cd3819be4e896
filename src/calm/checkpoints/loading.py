"""Loading whatever model a directory or hub id holds, with one clear line when it is not what it should be."""

import os
import pickle
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch.nn import Parameter
from transformers import AutoModelForCausalLM, PreTrainedModel

from calm.checkpoints.hub import check_weights, code_in_pickle, listing, read_config, read_index
from calm.checkpoints.meta_model import SETTINGS_ERRORS, outline
from calm.checkpoints.reference import AUTOENCODER, is_reference_layout
from calm.generation.settings import check_generation_config
from calm.models.auto_classes import current_model_type
from calm.models.modeling_autoencoder import CalmAutoencoder
from calm.models.modeling_calm import CalmForCausalLM

_PLAIN_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_PARAMETERS_PER_BYTE = 8  # at most: in any quantisation that transformers loads


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
    check_generation_config(Path(path) / "generation_config.json")
    _check_files(path)
    arguments: dict[str, Any] = {"output_loading_info": True, "ignore_mismatched_sizes": True}
    if dtype is not None:
        arguments["dtype"] = dtype
    if autoencoder is not None:
        arguments["autoencoder"] = autoencoder
    try:
        model, info = kind.from_pretrained(path, trust_remote_code=False, **arguments)
    except SafetensorError as error:
        raise ValueError(f"the weights in {path} are damaged or cut short ({error}): copy them again.") from error
    except pickle.UnpicklingError as error:
        raise ValueError(code_in_pickle(f"a weight file in {path}")) from error
    except OSError as error:
        raise ValueError(f"cannot load a model from {path}: {' '.join(str(error).split())}") from error
    except (EOFError, *SETTINGS_ERRORS) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(f"cannot load a model from {path}: {reason:.500}") from error
    ours = isinstance(model, CalmAutoencoder | CalmForCausalLM)
    unexpected = sorted(info["unexpected_keys"]) if ours else []
    check_weights(path, sorted(info["missing_keys"]), unexpected, sorted(info["mismatched_keys"]))
    check_finite_weights(path, model)
    return model.eval()


def _check_files(path: str | os.PathLike) -> None:
    """Raise ValueError where the files of a directory cannot make a model, before memory is taken for its weights."""
    directory = Path(path)
    if not directory.is_dir() or is_reference_layout(read_config(path)):
        return  # the hub's files are not here yet; the reference's are checked by name and shape
    for index in directory.glob("*.index.json"):
        read_index(index, "metadata")
    num_bytes = sum(file.stat().st_size for kind in ("*.safetensors", "*.bin") for file in directory.glob(kind))
    num_parameters = sum(parameter.numel() for parameter in outline(path).parameters())
    if num_bytes and num_parameters > _PARAMETERS_PER_BYTE * num_bytes:
        raise ValueError(
            f"config.json of {path} describes {num_parameters:,} parameters, and its weights have {num_bytes:,} bytes: "
            "they do not belong together."
        )


def check_finite_weights(path: str | os.PathLike, model: PreTrainedModel) -> None:
    """Raise ValueError for weights that hold NaN or infinity, of which nothing but NaN can be computed."""
    broken = [
        name
        for name, weight in model.named_parameters()
        if type(weight) is Parameter
        and weight.dtype in _PLAIN_DTYPES
        and weight.device.type != "meta"
        and weight.numel()
        # One pass without a copy; NaN propagates to both ends.
        if not torch.stack(weight.detach().aminmax()).isfinite().all()
    ]
    if broken:
        raise ValueError(
            f"the weights in {path} hold NaN or infinity in {len(broken)} tensors ({listing(broken, 3)}): the training "
            "diverged, or the file is damaged."
        )


def model_class(path: str | os.PathLike) -> Any:
    """The class that loads a directory or hub id; ValueError when it holds no model."""
    try:
        config = read_config(path)
    except OSError as error:
        raise ValueError(str(error)) from error
    if is_reference_layout(config):
        return CalmAutoencoder if config["architectures"][0] == AUTOENCODER else CalmForCausalLM
    kinds = {kind.config_class.model_type: kind for kind in (CalmAutoencoder, CalmForCausalLM)}
    return kinds.get(str(current_model_type(config.get("model_type"))), AutoModelForCausalLM)
