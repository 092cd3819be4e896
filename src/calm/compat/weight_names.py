"""Weights under former names: transformers loads them by a key mapping, and would save them under the former names."""

from typing import Any


def save_under_present_names(model: Any, key_mapping: dict[str, str]) -> None:
    """Make ``save_pretrained`` write the present names of weights that were loaded by a key mapping.

    transformers keeps the mapping in a private attribute of the loaded model and reverts it when it saves.
    """
    conversions = getattr(model, "_weight_conversions", None)
    if conversions:
        targets = {target.replace("\\", "") for target in key_mapping.values()}
        model._weight_conversions = [
            each for each in conversions if not targets & {str(target) for target in each.target_patterns}
        ]
