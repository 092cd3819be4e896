"""CALM: continuous autoregressive language models (arXiv 2510.27688).

An autoencoder turns K tokens into one vector and back; a transformer predicts the next vector.
"""

from importlib.metadata import PackageNotFoundError, version

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from calm.models.configuration_autoencoder import CalmAutoencoderConfig
from calm.models.configuration_calm import CalmConfig
from calm.models.configuration_heads import DiffusionHeadConfig, EnergyHeadConfig, FlowHeadConfig
from calm.models.modeling_autoencoder import CalmAutoencoder
from calm.models.modeling_calm import CalmForCausalLM

try:
    __version__ = version("calm-lm")
except PackageNotFoundError:  # run from a source tree that is not installed
    __version__ = "0.0.0"

AutoConfig.register("calm_autoencoder", CalmAutoencoderConfig, exist_ok=True)
AutoConfig.register("calm", CalmConfig, exist_ok=True)
AutoModel.register(CalmAutoencoderConfig, CalmAutoencoder, exist_ok=True)
AutoModelForCausalLM.register(CalmConfig, CalmForCausalLM, exist_ok=True)

__all__ = [
    "CalmAutoencoder",
    "CalmAutoencoderConfig",
    "CalmConfig",
    "CalmForCausalLM",
    "DiffusionHeadConfig",
    "EnergyHeadConfig",
    "FlowHeadConfig",
]
