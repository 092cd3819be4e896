"""Models without weights: their shapes on the meta device, in no time and no memory."""

import os
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from calm.models.configuration_autoencoder import CalmAutoencoderConfig
from calm.models.configuration_calm import CalmConfig
from calm.models.hub import read_config
from calm.models.modeling_autoencoder import CalmAutoencoder
from calm.models.modeling_calm import CalmForCausalLM
from calm.models.released import is_reference_layout, reference_config


def outline(source: PreTrainedConfig | str | os.PathLike) -> PreTrainedModel:
    """The model of a configuration, of a directory or of a hub id, on the meta device.

    Raises ValueError when there is no configuration.
    """
    config: Any = source if isinstance(source, PreTrainedConfig) else _configuration(source)
    with torch.device("meta"):
        if isinstance(config, CalmAutoencoderConfig):
            return CalmAutoencoder(config)
        return CalmForCausalLM(config) if isinstance(config, CalmConfig) else AutoModelForCausalLM.from_config(config)


def _configuration(path: str | os.PathLike) -> PreTrainedConfig:
    try:
        fields = read_config(path)
    except OSError as error:
        raise ValueError(str(error)) from error
    return reference_config(path, fields) if is_reference_layout(fields) else AutoConfig.from_pretrained(path)
