"""The log-likelihood of texts under a CALM, from a head with probabilities or from its token prediction.

A categorical flow head gives the probability with which ``sampler="direct"`` samples a text. Other heads only give
samples; there the probabilities are those of ``sampler="mtp"``.

Shapes: B texts, L patches of the longest context, M of the longest continuation, K tokens of a patch.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from calm.data.blocks import TokenBlocks
from calm.generation.model_runner import model_runner
from calm.generation.samplers import canonical_name

_PATCHES_AT_ONCE = 1024  # whose log-probabilities are computed together


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


@torch.no_grad()
def token_log_probs(
    model: Any,
    blocks: TokenBlocks,
    stride: int,
    num_blocks: int | None = None,
    batch_size: int = 8,
    sampler: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the tokens of held-out blocks and their exact log-probabilities at temperature 1.

    Args:
        model: a token model, or a CALM with token probabilities.
        blocks: the text; every block is read without the blocks before it.
        stride: number of tokens at the start of a block that are context only, a multiple of the patch size.
        num_blocks: number of evenly spread blocks; None for all.
        batch_size: blocks at a time.
        sampler: of a CALM, ``"direct"`` or ``"mtp"``; None for a token model.

    Returns:
        token ids (int64) and log-probabilities in nats (float64), both ``[blocks, block_size - stride]``.
    """
    runner = model_runner(model)
    runner.check_scoring(sampler)
    first = stride // runner.patch_size
    was_training = model.training
    model.eval()
    tokens, found = [], []
    for ids in blocks.batches(num_blocks, batch_size):
        hidden = runner.reader(ids.to(runner.device)).last_hidden_state[:, first - 1 : -1].flatten(0, 1)
        patches = ids[:, stride:].reshape(-1, runner.patch_size).to(runner.device)
        pieces = zip(hidden.split(_PATCHES_AT_ONCE), patches.split(_PATCHES_AT_ONCE), strict=True)
        log_probs = [runner.log_probs(states, text, sampler)[0].tokens.cpu().double() for states, text in pieces]
        tokens.append(ids[:, stride:])
        found.append(torch.cat(log_probs).view(len(ids), -1))
    model.train(was_training)
    return torch.cat(tokens), torch.cat(found)
