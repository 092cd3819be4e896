"""Exclusion of the frozen autoencoder of a language model from adapters.

Libraries for adapters (peft and others) replace a layer by a module that holds the layer and new parameters, which
``requires_grad=False`` of the old ones does not prevent. In the autoencoder such parameters either get no gradient or
change the tokens that the targets decode to.
"""

import warnings
from typing import Any

from torch import nn

_KEPT_OUT = (
    "the autoencoder of a CALM is frozen, and its layers get no adapter; backbone, head and the other parts do. "
    "(exclude_modules in a peft configuration excludes modules.)"
)


class FrozenLayers(nn.Module):
    """Base of modules whose layers cannot be replaced by adapters after :func:`keep_adapters_out`.

    Other replacements, such as quantised layers, are possible.
    """

    keeps_adapters_out = False

    def __setattr__(self, name: str, value: Any) -> None:
        if self.keeps_adapters_out and isinstance(value, nn.Module) and _is_adapter(value, self._modules.get(name)):
            warnings.warn(_KEPT_OUT, stacklevel=2)
            return
        super().__setattr__(name, value)


def keep_adapters_out(module: nn.Module) -> None:
    """Prevent adapters from replacing layers of a module."""
    for part in module.modules():
        if isinstance(part, FrozenLayers):
            part.keeps_adapters_out = True


def check_frozen(module: nn.Module) -> None:
    """Raise ValueError when a parameter of the autoencoder requires a gradient."""
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
