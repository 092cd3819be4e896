"""Former module of :mod:`calm.evaluation.statistics`; removed in the next release."""

import warnings

from calm.evaluation.statistics import MIN_BLOCKS, brier_difference, brier_errors, error_to_stop_at

__all__ = ["MIN_BLOCKS", "brier_difference", "brier_errors", "error_to_stop_at"]

warnings.warn("calm.evaluation.bootstrap is now calm.evaluation.statistics.", FutureWarning, stacklevel=2)
