"""Names in users' hands that changed: the old name works for one release, with a FutureWarning."""

import warnings
from collections.abc import Mapping
from typing import Any

# Options of the energy head that were removed, with the values that had no effect.
REMOVED_ENERGY_FIELDS = {"num_latent_groups": 1, "mean_pull_weight": 0.0}
# New names of fields of CalmConfig and of the section model of recipes, by former name.
RENAMED_CALM_FIELDS = {"token_prediction_weight": "mtp_weight", "token_prediction_type": "mtp_type"}
# New names of parts of a CALM, in the names of its weights, by former name.
RENAMED_CALM_PARTS = {"token_predictor": "mtp_head"}


def rename_deprecated(fields: dict[str, Any], new_names: Mapping[str, str], where: str, warn: bool = True) -> None:
    """Replace deprecated names in a dict of fields by their new ones, in place.

    Args:
        new_names: new name by deprecated name.
        where: what the fields belong to, for the messages: "CalmConfig", "model".
        warn: whether to warn; files that an earlier release wrote are translated without a warning.

    Raises:
        ValueError: when both the deprecated and the new name are given.
    """
    for old, new in new_names.items():
        if old not in fields:
            continue
        if new in fields:
            raise ValueError(f"{where}: {old} is the former name of {new}; give {new} alone.")
        if warn:
            warnings.warn(
                f"{where}: {old} is now called {new}; the former name will be removed.", FutureWarning, stacklevel=3
            )
        fields[new] = fields.pop(old)


def drop_removed(fields: dict[str, Any], neutral_values: Mapping[str, Any], where: str) -> None:
    """Drop fields that this version no longer has from a dict, in place; warn where their value had an effect.

    Args:
        neutral_values: value without an effect, by name of the removed field.
        where: what the fields belong to, for the messages.
    """
    for name, neutral in neutral_values.items():
        value = fields.pop(name, neutral)
        if value is not None and value != neutral:
            warnings.warn(
                f"{where}: {name} was removed and is ignored (it was {value!r}); docs/results/removed.md gives the "
                "reason and the last commit that has the code.",
                FutureWarning,
                stacklevel=3,
            )
