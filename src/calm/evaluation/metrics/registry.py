"""Registry of metrics: a metric is one file with a subclass of :class:`Metric`.

``calm evaluate`` and :func:`calm.evaluate` compute every registered metric that a model supports, write its values to
the JSON, and add its columns to the table.
"""

from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from typing import Any, ClassVar

from torch import Tensor

from calm.data.blocks import TokenBlocks
from calm.evaluation.likelihood import token_log_probs
from calm.generation.samplers import find_sampler

# The modules of the package's own metrics, in the order of the columns.
_MODULES = ("perplexity", "bits_per_byte")


@dataclass
class MetricInputs:
    """The model, the held-out text, and the settings of one evaluation.

    Attributes:
        model: CALM, token model or autoencoder.
        kind: ``"calm"``, ``"token model"`` or ``"autoencoder"``.
        tokenizer: the tokenizer of the model.
        blocks: the held-out text.
        stride: number of tokens at the start of a block that are context only.
        num_blocks: number of evenly spread blocks; None for all.
        batch_size: blocks at a time.
        temperature: of the samples.
        sampler: sampler of a CALM; None for other models.
        seed: of the samples, if the metric needs any.
    """

    model: Any
    kind: str
    tokenizer: Any
    blocks: TokenBlocks
    stride: int
    num_blocks: int | None = None
    batch_size: int = 8
    temperature: float = 1.0
    sampler: str | None = None
    seed: int = 0

    @cached_property
    def probability_sampler(self) -> str | None:
        """The sampler whose token probabilities are scored; None for a token model, and where there are none."""
        if self.kind != "calm":
            return None
        # At temperature 1, `batch` and `exact` sample from the same distribution as `direct`.
        name = "direct" if self.sampler in ("batch", "exact") else self.sampler
        known = name is not None and name in self.model.samplers and find_sampler(name).has_probabilities
        return name if known else None

    @property
    def has_probabilities(self) -> bool:
        """Whether the model has exact token probabilities with this sampler; at temperature 1 only."""
        if self.kind == "token model":
            return self.temperature == 1
        return self.temperature == 1 and self.probability_sampler is not None

    @cached_property
    def scored(self) -> tuple[Tensor, Tensor]:
        """Token ids and their log-probabilities in nats, both ``[blocks, block_size - stride]``; computed once."""
        return token_log_probs(
            self.model, self.blocks, self.stride, self.num_blocks, self.batch_size, self.probability_sampler
        )


class Metric:
    """Base of the metrics.

    Attributes:
        name: unique name of the metric.
        columns: heading of every value in tables, by its key in the JSON.
        digits: decimals of the values in tables.
    """

    name = ""
    columns: ClassVar[dict[str, str]] = {}
    digits = 2

    def supports(self, inputs: MetricInputs) -> bool:
        """Return whether the metric can be computed for a model and its sampler."""
        raise NotImplementedError

    def compute(self, inputs: MetricInputs) -> dict[str, float]:
        """Return the values by the keys of ``columns``."""
        raise NotImplementedError


_METRICS: dict[str, Metric] = {}


def register_metric(metric: type[Metric]) -> type[Metric]:
    """Add a metric under its ``name``; a decorator of subclasses of :class:`Metric`.

    Raises:
        ValueError: for an empty name, no columns, or a name or column that another metric has.
    """
    if not metric.name or not metric.columns:
        raise ValueError(f"metric {metric.__name__} needs a name and columns, got {metric.name!r}, {metric.columns}.")
    for other in _METRICS.values():
        if type(other).__qualname__ == metric.__qualname__ and other.name == metric.name:
            continue
        if other.name == metric.name:
            raise ValueError(f"a metric named {metric.name} exists already: choose another name.")
        if shared := sorted(other.columns.keys() & metric.columns.keys()):
            raise ValueError(f"metric {metric.name}: {other.name} has the column {shared[0]} already: rename it.")
    _METRICS[metric.name] = metric()
    return metric


def all_metrics() -> list[Metric]:
    """Return the registered metrics: those of the package first."""
    own = [import_module(f"calm.evaluation.metrics.{name}").__name__ for name in _MODULES]
    return sorted(_METRICS.values(), key=lambda each: type(each).__module__ not in own)


def compute_metrics(inputs: MetricInputs) -> dict[str, float]:
    """Compute every registered metric that supports the model: values by column."""
    values: dict[str, float] = {}
    for metric in all_metrics():
        if metric.supports(inputs):
            found = metric.compute(inputs)
            if unknown := sorted(found.keys() - metric.columns.keys()):
                raise ValueError(f"metric {metric.name} returned {unknown[0]}, which is not one of its columns.")
            values |= found
    return values
