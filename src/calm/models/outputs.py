"""The output of a CALM's forward pass.

Shapes: B batch, L patches, D hidden.
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache
from transformers.utils import ModelOutput


class NoLogitsError(ValueError, AttributeError):
    """Raised where logits of a CALM are asked for; an AttributeError, so that ``hasattr`` finds none."""

    def __init__(self) -> None:
        super().__init__(
            "a CALM has no logits: its head gives samples of the next patch. Its forward returns the loss when labels "
            "are passed; label smoothing, trl's SFTTrainer, lm-eval's `--model hf` and others that compute a loss or "
            "scores from logits cannot be used. `calm train`, transformers' Trainer, `calm evaluate` and `calm harness`"
            " can."
        )


@dataclass
class CalmOutput(ModelOutput):
    """
    Args:
        loss: scalar, when labels were given: the head's loss, mean over the target patches, and that of the token
            predictor where there is one.
        last_hidden_state: ``[B, L, D]``; position i is the condition of patch i + 1.
        past_key_values: the cache, one entry per patch.
        metrics: named parts of the loss, scalars.
        hidden_states: of the backbone's layers, each ``[B, L, D]``, where they were asked for.
    """

    loss: Tensor | None = None
    last_hidden_state: Tensor | None = None
    past_key_values: Cache | None = None
    metrics: dict[str, Tensor] | None = None
    hidden_states: tuple[Tensor, ...] | None = None

    @property
    def logits(self) -> Tensor:
        raise NoLogitsError

    def __getitem__(self, key: Any) -> Any:
        if key == "logits":
            raise NoLogitsError
        return super().__getitem__(key)
