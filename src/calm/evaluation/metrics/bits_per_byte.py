"""Bits per byte of held-out text."""

import math
from typing import ClassVar

from calm.evaluation.metrics.registry import Metric, MetricInputs, register_metric


@register_metric
class BitsPerByte(Metric):
    """Exact negative log2-probability of the text, divided by its UTF-8 bytes.

    Bytes are those of the decoded text; document separators have none, and their probabilities count. It compares
    between models with different tokenizers.
    """

    name = "bits_per_byte"
    columns: ClassVar = {"bits_per_byte": "bits/byte"}
    digits = 3

    def supports(self, inputs: MetricInputs) -> bool:
        return inputs.has_probabilities

    def compute(self, inputs: MetricInputs) -> dict[str, float]:
        tokens, log_probs = inputs.scored
        texts = inputs.tokenizer.batch_decode(
            tokens.tolist(), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        num_bytes = sum(len(text.encode("utf-8", "replace")) for text in texts)
        return {"bits_per_byte": -log_probs.sum().item() / math.log(2) / max(num_bytes, 1)}
