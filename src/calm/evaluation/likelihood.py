"""The log-likelihood of texts under a CALM, from a head with probabilities or from its token prediction.

A categorical flow head gives the probability with which ``sampler="direct"`` samples a text. Other heads only give
samples; there the probabilities are those of ``sampler="token_prediction"``.

Shapes: B texts, L patches of the longest context, M of the longest continuation, K tokens of a patch.
"""

from collections.abc import Sequence
from typing import Any

import torch

from calm.generation.prompts import left_padded


@torch.no_grad()
def log_likelihoods(
    model: Any,
    contexts: Sequence[Sequence[int]],
    continuations: Sequence[Sequence[int]],
    sampler: str = "token_prediction",
) -> list[tuple[float, bool]]:
    """Of every continuation its log-probability in nats, and whether each of its tokens is the likeliest one.

    Args:
        model: a CALM with a categorical flow head or with token prediction.
        contexts: token ids; aligned to patches as prompts of ``generate`` are. None is the beginning of a document.
        continuations: token ids.
        sampler: ``"direct"`` or ``"token_prediction"``, whose probabilities are meant.
    """
    patch_size, device = model.config.patch_size, model.device
    aligned, patch_mask = model.align_prompt(*left_padded(contexts, model.config.separator_id))

    num_patches = -(-max(map(len, continuations)) // patch_size)
    following = torch.full((len(contexts), num_patches * patch_size), model.config.separator_id)
    counts = torch.arange(following.shape[1]) < torch.tensor([len(each) for each in continuations])[:, None]
    following[counts] = torch.tensor([token for each in continuations for token in each], dtype=torch.long)
    is_text = counts.unflatten(1, (-1, patch_size)).any(-1).to(patch_mask.dtype)  # [B, M]
    mask = torch.cat([patch_mask, is_text], dim=1).to(device)
    hidden = model(
        torch.cat([aligned, following], dim=1).to(device),
        attention_mask=None if bool(mask.all()) else mask,
        position_ids=(mask.cumsum(1) - 1).clamp(min=0),
    ).last_hidden_state[:, -num_patches - 1 : -1]  # [B, M, D]
    patches = following.view(-1, patch_size).to(device)
    states = hidden.flatten(0, 1)
    if sampler == "direct":
        found = model.head.log_probabilities(states, patches)
    else:
        found = model.token_predictor.log_probabilities(states, patches, model.token_matrix(hidden.device))
    log_probability, likeliest = (each.cpu().view(counts.shape) for each in found)
    sums = log_probability.double().masked_fill(~counts, 0).sum(1)
    return list(zip(sums.tolist(), (likeliest | ~counts).all(1).tolist(), strict=True))
