"""CALM: continuous autoregressive language models (arXiv 2510.27688).

An autoencoder turns K tokens into one vector and back; a transformer predicts the next vector.

The public API is ``__all__``; everything else may change without notice. The names are imported when they are first
used, so that ``import calm`` needs neither torch nor transformers.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from calm.models.auto_classes import register_configurations

if TYPE_CHECKING:
    from calm.evaluation.metrics.registry import Metric, MetricInputs, register_metric
    from calm.evaluation.run import evaluate
    from calm.generation.samplers import register_sampler
    from calm.generation.sampling_params import SamplingParams
    from calm.models.configuration_autoencoder import CalmAutoencoderConfig
    from calm.models.configuration_calm import CalmConfig
    from calm.models.configuration_codes import TokenCodesConfig
    from calm.models.drafters import load_drafter
    from calm.models.heads.base import Head, HeadConfig, HeadLoss
    from calm.models.heads.categorical_flow import CategoricalFlowHeadConfig
    from calm.models.heads.diffusion import DiffusionHeadConfig
    from calm.models.heads.energy import EnergyHeadConfig
    from calm.models.heads.flow import FlowHeadConfig
    from calm.models.heads.registry import register_head
    from calm.models.modeling_autoencoder import CalmAutoencoder
    from calm.models.modeling_calm import CalmForCausalLM
    from calm.models.modeling_codes import TokenCodes
    from calm.models.mtp import MTPHead
    from calm.workflows.text_model import TextModel, load
    from calm.workflows.train import train

    __version__: str

__all__ = [
    "CalmAutoencoder",
    "CalmAutoencoderConfig",
    "CalmConfig",
    "CalmForCausalLM",
    "CategoricalFlowHeadConfig",
    "DiffusionHeadConfig",
    "EnergyHeadConfig",
    "FlowHeadConfig",
    "Head",
    "HeadConfig",
    "HeadLoss",
    "MTPHead",
    "Metric",
    "MetricInputs",
    "SamplingParams",
    "TextModel",
    "TokenCodes",
    "TokenCodesConfig",
    "__version__",
    "evaluate",
    "load",
    "load_drafter",
    "register_head",
    "register_metric",
    "register_sampler",
    "train",
]

# The module of every public name.
_MODULES = {
    "CalmAutoencoder": "calm.models.modeling_autoencoder",
    "CalmAutoencoderConfig": "calm.models.configuration_autoencoder",
    "CalmConfig": "calm.models.configuration_calm",
    "CalmForCausalLM": "calm.models.modeling_calm",
    "CategoricalFlowHeadConfig": "calm.models.heads.categorical_flow",
    "DiffusionHeadConfig": "calm.models.heads.diffusion",
    "EnergyHeadConfig": "calm.models.heads.energy",
    "FlowHeadConfig": "calm.models.heads.flow",
    "Head": "calm.models.heads.base",
    "HeadConfig": "calm.models.heads.base",
    "HeadLoss": "calm.models.heads.base",
    "MTPHead": "calm.models.mtp",
    "Metric": "calm.evaluation.metrics.registry",
    "MetricInputs": "calm.evaluation.metrics.registry",
    "SamplingParams": "calm.generation.sampling_params",
    "TextModel": "calm.workflows.text_model",
    "TokenCodes": "calm.models.modeling_codes",
    "TokenCodesConfig": "calm.models.configuration_codes",
    "evaluate": "calm.evaluation.run",
    "load": "calm.workflows.text_model",
    "load_drafter": "calm.models.drafters",
    "register_head": "calm.models.heads.registry",
    "register_metric": "calm.evaluation.metrics.registry",
    "register_sampler": "calm.generation.samplers",
    "train": "calm.workflows.train",
}
_PACKAGES = (
    "checkpoints",
    "data",
    "evaluation",
    "functional",
    "generation",
    "models",
    "report",
    "serving",
    "training",
    "workflows",
)

register_configurations()


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        value = getattr(import_module(_MODULES[name]), name)
    elif name in _PACKAGES:
        value = import_module(f"calm.{name}")
    elif name == "__version__":
        value = _version()
    else:
        raise AttributeError(f"module 'calm' has no attribute {name!r}")
    globals()[name] = value  # the next access does not pass here
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_PACKAGES})


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("calm-lm")
    except PackageNotFoundError:  # a source tree that is not installed
        return "0.0.0"
