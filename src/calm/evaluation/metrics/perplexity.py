"""Perplexity of held-out text: exp of the mean negative log-probability of a token."""

from typing import ClassVar

from calm.evaluation.metrics.registry import Metric, MetricInputs, register_metric


@register_metric
class Perplexity(Metric):
    """Exact perplexity per token at temperature 1, of models with token probabilities.

    It is infinite where a token has probability 0. Perplexities compare only between models with the same tokenizer.
    """

    name = "perplexity"
    columns: ClassVar = {"perplexity": "perplexity"}

    def supports(self, inputs: MetricInputs) -> bool:
        return inputs.has_probabilities

    def compute(self, inputs: MetricInputs) -> dict[str, float]:
        _, log_probs = inputs.scored
        return {"perplexity": log_probs.mean().neg().exp().item()}
