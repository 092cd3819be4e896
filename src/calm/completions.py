"""Former module of :mod:`calm.generation.completions`; removed in the next release."""

import warnings

from calm.generation.completions import complete, complete_file
from calm.generation.sampling_params import SamplingParams as SamplingSettings

__all__ = ["SamplingSettings", "complete", "complete_file"]

warnings.warn(
    "calm.completions is now calm.generation.completions, and SamplingSettings is calm.SamplingParams.",
    FutureWarning,
    stacklevel=2,
)
