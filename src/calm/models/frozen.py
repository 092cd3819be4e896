"""Keeping adapters out of the frozen autoencoder of a language model.

Libraries for adapters (peft and others) replace a layer by a module that holds the layer and new parameters, which
``requires_grad=False`` of the old ones does not prevent. In the autoencoder such parameters either get no gradient or
change the tokens that the targets decode to.
"""

import warnings
from typing import Any

from torch import nn

_KEPT_OUT = (
    "the autoencoder of a CALM is frozen, and no adapter is put on its layers; backbone, head and the other parts get "
    "theirs. (exclude_modules in a peft configuration names what is left out.)"
)


class FrozenLayers(nn.Module):
    """Base of the modules whose layers keep adapters out once :func:`keep_adapters_out` was called on them.

    Layers may still be replaced by others, such as quantised ones.
    """

    keeps_adapters_out = False

    def __setattr__(self, name: str, value: Any) -> None:
        if self.keeps_adapters_out and isinstance(value, nn.Module) and _is_adapter(value, self._modules.get(name)):
            warnings.warn(_KEPT_OUT, stacklevel=2)
            return
        super().__setattr__(name, value)


def keep_adapters_out(module: nn.Module) -> None:
    """Let no adapter replace a layer of the module."""
    for part in module.modules():
        if isinstance(part, FrozenLayers):
            part.keeps_adapters_out = True


def check_frozen(module: nn.Module) -> None:
    """Raise ValueError where something in the autoencoder is to be trained."""
    names = [name for name, parameter in module.named_parameters() if parameter.requires_grad]
    if names:
        raise ValueError(
            f"the autoencoder of a CALM is frozen, and {len(names)} parameters in it are to be trained "
            f"({', '.join(names[:3])}): leave autoencoder.* out of what is adapted or trained."
        )


def _is_adapter(module: nn.Module, layer: nn.Module | None) -> bool:
    """Return whether a module holds a layer and parameters of its own."""
    if layer is None or module is layer or not any(part is layer for part in module.modules()):
        return False
    known = {id(parameter) for parameter in layer.parameters()}
    return any(id(parameter) not in known for parameter in module.parameters())
