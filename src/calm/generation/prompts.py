"""Prompts as the model reads them: whole patches, and no padding inside the text.

Shapes: B batch, T tokens, K tokens of a patch, L patches.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def left_padded(rows: Sequence[Sequence[int]], pad: int) -> tuple[Tensor, Tensor]:
    """Return prompts of any length as a batch: token ids and mask, ``[B, T]``."""
    length = max(map(len, rows))
    ids = torch.tensor([[pad] * (length - len(row)) + list(row) for row in rows], dtype=torch.long)
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows], dtype=torch.long)
    return ids.view(len(rows), length), mask.view(len(rows), length)


def check_prompts(input_ids: Tensor) -> None:
    """Raise ValueError for anything but a batch of token ids."""
    if not isinstance(input_ids, Tensor) or input_ids.dim() != 2 or len(input_ids) == 0:
        given = tuple(input_ids.shape) if isinstance(input_ids, Tensor) else type(input_ids).__name__
        raise ValueError(f"input_ids must be a tensor [batch, tokens] of at least one row, got {given}.")
    if input_ids.is_floating_point() or input_ids.dtype == torch.bool:
        raise ValueError(f"input_ids must be whole numbers (torch.long), got {input_ids.dtype}.")


def check_token_ids(input_ids: Tensor, vocab_size: int) -> None:
    """Raise ValueError for token ids outside the vocabulary."""
    if input_ids.numel() and not (int(input_ids.min()) >= 0 and int(input_ids.max()) < vocab_size):
        raise ValueError(
            f"input_ids must be in 0 to {vocab_size - 1} (the model's vocabulary), got "
            f"{int(input_ids.min())} to {int(input_ids.max())}: is it this model's tokenizer?"
        )


def align_prompt(
    input_ids: Tensor, attention_mask: Tensor | None, patch_size: int, vocab_size: int, separator: int
) -> tuple[Tensor, Tensor]:
    """Make prompts end on a patch boundary: ``[B, T] -> [B, L * K], patch mask [B, L]``.

    The places before a prompt are filled with the document separator (EOS): in packed training text documents follow
    it at every offset, so the model has seen this. An empty prompt is one patch of separators.

    Raises:
        ValueError: for masks with holes and for tokens outside the vocabulary.
    """
    check_prompts(input_ids)
    batch_size, length = input_ids.shape
    if attention_mask is None:
        attention_mask = torch.ones_like(input_ids)
    if attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"attention_mask must have the shape of input_ids, {tuple(input_ids.shape)}, got "
            f"{tuple(attention_mask.shape)}."
        )
    if length and (attention_mask.long().diff(dim=1) < 0).any():
        raise ValueError(
            "attention_mask must be 0 for padding on the left and 1 from the first to the last token of the "
            'prompt; tokenise with padding_side="left".'
        )
    check_token_ids(input_ids, vocab_size)
    fill = -length % patch_size if length else patch_size
    real = torch.cat([attention_mask.new_zeros(batch_size, fill), attention_mask], dim=1).bool()
    front = input_ids.new_full((batch_size, fill), separator)
    aligned = torch.cat([front, input_ids], dim=1).masked_fill(~real, separator)
    patch_mask = real.unflatten(1, (-1, patch_size)).any(-1)
    patch_mask[:, -1] = True
    return aligned, patch_mask.long()
