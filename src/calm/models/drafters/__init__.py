"""Drafters: they propose tokens that a token model, their target, verifies."""

import os

from calm.models.drafters.base import Draft, DraftBatch, Drafter
from calm.models.drafters.categorical_flow import CategoricalFlowDrafter
from calm.models.drafters.configuration import DrafterConfig
from calm.models.drafters.eagle import EagleDrafter
from calm.models.drafters.mtp import MTPDrafter
from calm.utils.paths import did_you_mean

__all__ = ["DRAFTERS", "Draft", "DraftBatch", "Drafter", "DrafterConfig", "load_drafter"]

DRAFTERS: dict[str, type[Drafter]] = {
    "categorical_flow": CategoricalFlowDrafter,
    "eagle": EagleDrafter,
    "mtp": MTPDrafter,
}


def load_drafter(path: str | os.PathLike) -> Drafter:
    """Load a drafter from a directory.

    Raises:
        ValueError: if the directory holds no drafter.
    """
    if not os.path.isfile(os.path.join(path, "config.json")):
        hint = "" if os.path.exists(path) else did_you_mean(path)
        raise ValueError(f"{path} is not the directory of a drafter (it has no config.json){hint or '.'}")
    try:
        config = DrafterConfig.from_pretrained(path, trust_remote_code=False)
    except TypeError as error:
        raise ValueError(f"config.json of {path} is not that of a drafter: {error}.") from None
    if config.to_dict().get("target_hash") in (None, ""):
        raise ValueError(f"{path} holds a {config.model_type}, not a drafter: train one with `calm drafter`.")
    drafter = DRAFTERS[config.drafter_type].from_pretrained(path, config=config, trust_remote_code=False)
    return drafter.eval()
