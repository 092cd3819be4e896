"""How much the hidden states of a CALM know of the next patch, whatever its head makes of it.

A model trained with token prediction holds a read-out for every token of the next patch. Read alone, they are a
language model of one patch whose tokens are independent given the context. Its Brier scores need no draws, and say
what to work on: where the head's samples score far lower it is the head that limits the model, where the read-outs
themselves are far below a token model it is the backbone.

Shapes: B blocks, P scored positions, n first tokens of a patch, V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor

from calm.data.blocks import TokenBlocks
from calm.evaluation.brier_scores import scored_positions
from calm.functional.brier import NGRAM
from calm.functional.tiles import rows_at_once

_TILE_ELEMENTS = 2**22  # of a (positions x tokens x vocabulary) tensor: 16 MiB in float32


@torch.no_grad()
def read_out_brier(
    model: Any, blocks: TokenBlocks, stride: int, num_blocks: int | None = None, batch_size: int = 8
) -> list[float]:
    """Brier-1 to Brier-n, times 100, of the read-outs; n is the patch size, 4 at most.

    Args:
        model: a :class:`~calm.models.modeling_calm.CalmForCausalLM` with a token predictor.
        stride, num_blocks: as in :func:`~calm.evaluation.brier_lm.evaluate_brier`; the positions are the same.
    """
    patch_size = model.config.patch_size
    model.eval()
    starts = scored_positions(blocks.block_size, stride).to(model.device)
    scores = []
    for batch in blocks.batches(num_blocks, batch_size):
        ids = batch.to(model.device)
        hidden = model(ids).last_hidden_state[:, starts // patch_size - 1]
        text = ids.unflatten(1, (-1, patch_size))[:, starts // patch_size, :NGRAM]
        scores.append(_scores(model, hidden.flatten(0, 1), text.flatten(0, 1)))
    return (100 * torch.cat(scores).cpu().double().mean(0)).tolist()


def _scores(model: Any, hidden: Tensor, text: Tensor) -> Tensor:
    """Brier scores ``[P, n]`` behind hidden states ``[P, D]``, a tile at a time."""
    size = rows_at_once(text.shape[1] * model.config.vocab_size, text.device, _TILE_ELEMENTS)
    return torch.cat([_tile(model, *tile) for tile in zip(hidden.split(size), text.split(size), strict=True)])


def _tile(model: Any, hidden: Tensor, text: Tensor) -> Tensor:
    states = model.token_predictor.states(hidden)[:, : text.shape[1]]
    law = (states @ model.get_input_embeddings().weight.T).float().softmax(-1)  # [P, n, V]
    hit = law.gather(-1, text[..., None])[..., 0].cumprod(-1)
    collision = torch.linalg.vecdot(law, law).cumprod(-1)
    return 2 * hit - collision
