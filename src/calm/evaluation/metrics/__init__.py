"""Metrics of ``calm evaluate``: one file each, listed in :mod:`calm.evaluation.metrics.registry`."""
