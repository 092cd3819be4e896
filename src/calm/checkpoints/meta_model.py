"""Models without weights: their shapes on the meta device, in no time and no memory."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from calm.checkpoints.hub import read_config
from calm.checkpoints.reference import is_reference_layout, reference_config
from calm.models.configuration_autoencoder import CalmAutoencoderConfig
from calm.models.configuration_calm import CalmConfig
from calm.models.modeling_autoencoder import CalmAutoencoder
from calm.models.modeling_calm import CalmForCausalLM

# What transformers and torch raise for settings that make no model, beside ValueError.
SETTINGS_ERRORS = (
    LookupError, TypeError, AttributeError, ArithmeticError, RuntimeError, ImportError, AssertionError,
    StrictDataclassError,
)  # fmt: skip


def outline(source: PreTrainedConfig | str | os.PathLike) -> PreTrainedModel:
    """Return the model of a configuration, of a directory or of a hub id, on the meta device.

    Raises ValueError when there is no configuration, or none that makes a model.
    """
    if isinstance(source, PreTrainedConfig):
        return _on_meta_device(source)
    with settings_may_not_fit(f"the settings in config.json of {source}"):
        return _on_meta_device(_configuration(source))


@contextmanager
def settings_may_not_fit(what: str) -> Iterator[None]:
    """Turn whatever transformers raises for settings that make no model into a ValueError of one line.

    Args:
        what: the settings, for the message.
    """
    try:
        yield
    except SETTINGS_ERRORS as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(f"{what} make no model: {reason}") from error


def _on_meta_device(config: Any) -> PreTrainedModel:
    with torch.device("meta"):
        if isinstance(config, CalmAutoencoderConfig):
            return CalmAutoencoder(config)
        if isinstance(config, CalmConfig):
            return CalmForCausalLM(config)
        return AutoModelForCausalLM.from_config(config, trust_remote_code=False)


def _configuration(path: str | os.PathLike) -> PreTrainedConfig:
    try:
        fields = read_config(path)
    except OSError as error:
        raise ValueError(str(error)) from error
    if is_reference_layout(fields):
        return reference_config(path, fields)
    return AutoConfig.from_pretrained(path, trust_remote_code=False)
