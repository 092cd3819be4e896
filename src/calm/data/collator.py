"""Texts of any length as a batch, for training loops of one's own; `calm train` packs documents into blocks instead.

Shapes: B texts, T tokens of the longest, rounded up to whole patches of K.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass
class PatchCollator:
    """Pads texts on the right to whole patches.

    A patch with any label -100 has no loss. So the last patch of a text is filled up with the separator, which counts:
    a text that ends in it teaches the model where to end, whatever its length. Patches behind that are masked.

    Args:
        patch_size: K of the model, ``model.config.patch_size``.
        separator_id: the token that stands between documents, ``model.config.separator_id``.
        max_length: tokens of a text at most, a multiple of K; what is longer is cut.
    """

    patch_size: int
    separator_id: int
    max_length: int | None = None

    def __post_init__(self) -> None:
        if self.patch_size < 1:
            raise ValueError(f"patch_size must be at least 1, got {self.patch_size}.")
        if self.max_length is not None and (self.max_length < 1 or self.max_length % self.patch_size):
            raise ValueError(
                f"max_length must be a multiple of the patch size {self.patch_size}, got {self.max_length}."
            )

    def __call__(self, texts: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Texts with ``input_ids`` (and ``labels``) to ``input_ids``, ``attention_mask`` and ``labels``, ``[B, T]``."""
        rows = [self._row(text) for text in texts]
        length = max(len(ids) for ids, _ in rows)
        shape = (len(rows), length)
        batch = {
            "input_ids": torch.full(shape, self.separator_id, dtype=torch.long),
            "attention_mask": torch.zeros(shape, dtype=torch.long),
            "labels": torch.full(shape, -100, dtype=torch.long),
        }
        for row, (ids, labels) in enumerate(rows):
            batch["input_ids"][row, : len(ids)] = torch.tensor(ids)
            batch["attention_mask"][row, : len(ids)] = 1
            batch["labels"][row, : len(ids)] = torch.tensor(labels)
        return batch

    def _row(self, text: Mapping[str, Any]) -> tuple[list[int], list[int]]:
        """Ids and labels of a text in whole patches."""
        ids = [int(token) for token in text["input_ids"]][: self.max_length]
        labels = ids if text.get("labels") is None else [int(label) for label in text["labels"]][: self.max_length]
        if not ids or len(labels) != len(ids):
            raise ValueError(f"a text needs tokens and as many labels, got {len(ids)} tokens and {len(labels)} labels.")
        fill = [self.separator_id] * (-len(ids) % self.patch_size)
        return ids + fill, labels + (fill if labels[-1] != -100 else [-100] * len(fill))
