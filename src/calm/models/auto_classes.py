"""Registration of the CALM classes with the Auto classes of transformers, without importing transformers.

After ``import calm``, ``AutoModelForCausalLM.from_pretrained`` loads a CALM, and ``import calm`` itself does not spend
the seconds that importing transformers and torch takes. Registration has two steps:

1. The configurations register with ``AutoConfig`` when transformers imports ``AutoConfig`` (an import hook), or at once
   if it is imported already. Their modules may import nothing else of transformers than ``AutoConfig`` and
   ``PreTrainedConfig``: the rest may be half imported at that moment.
2. The models register when the first configuration is constructed: every way to a model passes through that. The
   moment when ``AutoModel`` is imported is too early, because the model files of transformers import it themselves.

Without ``import calm`` transformers knows no plugins, and its error prints nothing of a checkpoint but the
``model_type``. The model types therefore start with the name of the package to install, ``calm-lm``.
"""

import importlib
import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from typing import Any

_AUTO_CONFIG = "transformers.models.auto.configuration_auto"
_CONFIGURATIONS = ("calm.models.configuration_autoencoder", "calm.models.configuration_calm")
_MODELS = ("calm.models.modeling_autoencoder", "calm.models.modeling_calm")

_FORMER_MODEL_TYPES = {"calm": "calm-lm", "calm_autoencoder": "calm-lm-autoencoder"}


def register_configurations() -> None:
    """Register the configurations as soon as transformers' ``AutoConfig`` is imported."""
    if _AUTO_CONFIG in sys.modules:
        _import(_CONFIGURATIONS)
    elif not any(isinstance(finder, _AutoConfigFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AutoConfigFinder())


def register_models() -> None:
    """Register the models; called whenever a configuration is constructed."""
    _import(_MODELS)


def register_configuration(config_class: Any) -> None:
    """Register a configuration with ``AutoConfig``, also under the name that older checkpoints were saved with."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING, AutoConfig

    AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
    for former, current in _FORMER_MODEL_TYPES.items():
        if current == config_class.model_type:
            CONFIG_MAPPING.register(former, config_class, exist_ok=True)


def current_model_type(model_type: Any) -> Any:
    """Return the ``model_type`` of a checkpoint, the current one where it was saved under a former one."""
    return _FORMER_MODEL_TYPES.get(model_type, model_type) if isinstance(model_type, str) else model_type


class _AutoConfigFinder(MetaPathFinder):
    """Find the module of ``AutoConfig`` as usual, and import our configurations after it."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if fullname != _AUTO_CONFIG:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def execute_and_register(module: Any) -> None:
            execute(module)
            _import(_CONFIGURATIONS)

        spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


def _import(names: tuple[str, ...]) -> None:
    """Import modules that register their classes at their end; one that is being imported now will do so."""
    for name in names:
        importlib.import_module(name)
