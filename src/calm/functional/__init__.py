"""Pure functions of the method: tensors in, tensors out, nothing but torch imported."""

from calm.functional.brier import brier_estimate, brier_lm
from calm.functional.energy_score import energy_score, energy_score_terms
from calm.functional.gaussian import gaussian_kl, gaussian_sample
from calm.functional.temperature import batch_temperature_sample

__all__ = [
    "batch_temperature_sample",
    "brier_estimate",
    "brier_lm",
    "energy_score",
    "energy_score_terms",
    "gaussian_kl",
    "gaussian_sample",
]
