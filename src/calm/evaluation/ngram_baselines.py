"""Unigram and bigram counts as the floor of BrierLM: what a model that looks at no, or one, token would score.

Their Brier scores need no sampling: hits are products of probabilities, and collisions follow from a recursion.
"""

import hashlib

import numpy as np
import torch

from calm.data.blocks import TokenBlocks
from calm.evaluation.brier_lm import BrierResult, summarise
from calm.evaluation.brier_scores import scored_positions
from calm.functional.brier import NGRAM

_MAX_VOCAB_SIZE = 16384  # the bigram table is vocabulary x vocabulary in float32
_PRIOR_COUNTS = 1.0  # weight of the unigram distribution in a bigram row


def evaluate_counts(
    train: TokenBlocks, validation: TokenBlocks, order: int, stride: int, num_blocks: int | None = None
) -> BrierResult:
    """BrierLM of the unigram (``order`` 1) or bigram (2) model of the training tokens, on the n-grams of
    :func:`~calm.evaluation.brier_lm.evaluate_brier`."""
    table = _transition_table(train, order)
    # collision[n - 1][c]: probability that two n-grams drawn behind token c are equal.
    collision, ahead = [], torch.ones(table.shape[1], dtype=table.dtype)
    for _ in range(NGRAM):
        ahead = (table.square() @ ahead).expand(table.shape[1])
        collision.append(ahead)
    collision_Vn = torch.stack(collision, dim=-1)

    ids = torch.cat(list(validation.batches(num_blocks, batch_size=64)))
    starts = scored_positions(validation.block_size, stride)
    places = starts[:, None] + torch.arange(NGRAM)
    before, after = ids[:, places - 1], ids[:, places]
    hit = table.expand(table.shape[1], -1)[before, after].cumprod(-1)
    return summarise(
        hit.mean(1).double(),
        collision_Vn[ids[:, starts - 1]].mean(1).double(),
        validation.documents(num_blocks),
        num_positions=len(ids) * len(starts),
        block_size=validation.block_size,
        stride=stride,
        num_samples=0,
        temperature=1.0,
        sampler=None,
        seed=0,
        data_sha256=hashlib.sha256(ids.numpy().tobytes()).hexdigest(),
        seconds=0.0,
    )


def _transition_table(train: TokenBlocks, order: int) -> torch.Tensor:
    """P(next | previous): ``[1, V]`` for order 1, ``[V, V]`` for order 2."""
    vocab_size = train.manifest["vocab_size"]
    if order not in (1, 2):
        raise ValueError(f"order must be 1 (unigram) or 2 (bigram), got {order}.")
    if vocab_size > _MAX_VOCAB_SIZE:
        raise ValueError(f"count models are for vocabularies of at most {_MAX_VOCAB_SIZE} tokens, got {vocab_size}.")
    tokens = np.concatenate([train[index]["input_ids"].numpy() for index in range(len(train))])
    unigram = np.bincount(tokens, minlength=vocab_size).astype(np.float32)
    unigram /= unigram.sum()
    if order == 1:
        return torch.from_numpy(unigram)[None]
    pairs = np.bincount(tokens[:-1] * vocab_size + tokens[1:], minlength=vocab_size**2).astype(np.float32)
    counts = pairs.reshape(vocab_size, vocab_size) + _PRIOR_COUNTS * unigram
    return torch.from_numpy(counts / counts.sum(1, keepdims=True))
