"""The heads by name: those of this package, and those that other modules register."""

import importlib
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from calm.models.heads.base import Head

AnyHead = TypeVar("AnyHead", bound="type[Head]")

# Imported when a head is first asked for: configurations of models are imported before the rest of transformers.
_OWN_HEADS = {name: f"calm.models.heads.{name}" for name in ("energy", "diffusion", "flow", "categorical_flow")}
_registered: dict[str, "type[Head]"] = {}


def register_head(head_class: AnyHead) -> AnyHead:
    """Make a head known under the ``type`` of its configuration; a class decorator.

    Configurations, recipes and checkpoints then find it by ``head_config.type``.

    Raises:
        ValueError: when the class has no configuration with a ``type``, or another head has that name.
    """
    config_class = getattr(head_class, "config_class", None)
    name = getattr(config_class, "type", None)
    if not isinstance(name, str) or not name:
        raise ValueError(
            f"{head_class.__name__} cannot be registered: set config_class to a HeadConfig whose field type has the "
            "name of the head as its default."
        )
    known = _registered.get(name)
    is_own = name in _OWN_HEADS and head_class.__module__ != _OWN_HEADS[name]
    if is_own or (
        known is not None and (known.__module__, known.__name__) != (head_class.__module__, head_class.__name__)
    ):
        raise ValueError(f"a head of type {name!r} is registered already: give the configuration another type.")
    _registered[name] = head_class
    return head_class


def head_types() -> list[str]:
    """Return the names of all registered heads, those of this package first."""
    return list(dict.fromkeys([*_OWN_HEADS, *_registered]))


def find_head(head_type: object, where: str = "head_config.type") -> "type[Head]":
    """Return the class of a head.

    Args:
        where: what names the head, for the message.

    Raises:
        ValueError: when no head has that name.
    """
    if isinstance(head_type, str) and head_type in _OWN_HEADS:
        importlib.import_module(_OWN_HEADS[head_type])
    if not isinstance(head_type, str) or head_type not in _registered:
        raise ValueError(
            f"{where} must be one of {', '.join(head_types())}, got {head_type!r}. A head of your own is registered by "
            "the module that defines it: import that first (`calm COMMAND --import MODULE`)."
        )
    return _registered[head_type]


def reference_architectures() -> dict[str, str]:
    """Return the types of the heads that the reference implementation has, by its names of their models."""
    heads = {name: find_head(name) for name in head_types()}
    return {str(head.reference_architecture): name for name, head in heads.items() if head.reference_architecture}
