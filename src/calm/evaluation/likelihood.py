"""The log-likelihood of texts under a CALM, from a head with probabilities or from its token prediction.

A categorical flow head gives the probability with which ``sampler="direct"`` samples a text. Other heads only give
samples; there the probabilities are those of ``sampler="mtp"``.

Shapes: B texts, L patches of the longest context, M of the longest continuation, K tokens of a patch.
"""

from collections.abc import Sequence
from typing import Any

from calm.generation.model_runner import model_runner
from calm.generation.samplers import canonical_name


def log_likelihoods(
    model: Any,
    contexts: Sequence[Sequence[int]],
    continuations: Sequence[Sequence[int]],
    sampler: str = "mtp",
) -> list[tuple[float, bool]]:
    """Of every continuation its log-probability in nats, and whether each of its tokens is the likeliest one.

    Args:
        model: a CALM with a categorical flow head or with token prediction.
        contexts: token ids; aligned to patches as prompts of ``generate`` are. None is the beginning of a document.
        continuations: token ids.
        sampler: ``"direct"`` or ``"mtp"``, whose probabilities are meant.
    """
    return model_runner(model).score(contexts, continuations, canonical_name(sampler))
