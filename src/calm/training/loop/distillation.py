"""Distillation: a token model draws several continuations of every context, and they are the energy score's targets.

The text shows one continuation of a context; the distribution of the next patch, which the head has to learn, shows in
many. Draws are all that is needed of the teacher. They are made for all patches of a block at once, as branches of its
key/value cache.

Shapes: B blocks, T = L * K tokens, L patches, K tokens of a patch, S continuations, V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor

from calm.evaluation.branches import Branches
from calm.functional.rng import Generator, pick, uniform

_TILE_ELEMENTS = 2**26  # of the distributions that exist at once: 256 MiB in float32


@torch.no_grad()
def draw_continuations(
    teacher: Any, ids: Tensor, patch_size: int, num_continuations: int, generator: Generator = None
) -> Tensor:
    """Independent draws of every patch behind the first, given the text before it: ``[B, T] -> [S, B, L - 1, K]``.

    Args:
        teacher: a token model of transformers, in evaluation mode.
        generator: one, or a list of one per block: what a block gets then does not depend on those beside it.
    """
    ids = ids[:, :-patch_size]
    outputs = teacher.base_model(ids, use_cache=True)
    branches = Branches(teacher.base_model, outputs.past_key_values, ids.shape[1])
    contexts = torch.arange(patch_size - 1, ids.shape[1], patch_size, device=ids.device)  # last tokens of patches
    drawn = []
    for some in branches.backwards(contexts, num_continuations):
        tokens = [_draw(teacher, outputs.last_hidden_state[:, some], num_continuations, generator).flatten(1)]
        where = some.repeat_interleave(num_continuations).expand(len(ids), -1)  # a node for each continuation
        visible = branches.behind(where)
        for depth in range(1, patch_size):
            inputs = teacher.get_input_embeddings()(tokens[-1])
            hidden, visible = branches.grow(inputs, where + depth, visible)
            tokens.append(_draw(teacher, hidden, 1, generator).flatten(1))
        drawn.append(torch.stack(tokens, dim=-1).unflatten(1, (-1, num_continuations)))
    return torch.cat(drawn[::-1], dim=1).permute(2, 0, 1, 3)


def _draw(teacher: Any, hidden: Tensor, num_draws: int, generator: Generator) -> Tensor:
    """Draws of the next token: ``[B, n, D] -> [B, n, num_draws]``."""
    output = teacher.get_output_embeddings()
    # All at once: what a block gets does not depend on the tiles.
    uniforms = uniform((*hidden.shape[:-1], num_draws), generator, hidden.device, row_dim=0)
    size = max(1, _TILE_ELEMENTS // (len(hidden) * len(output.weight)))
    tiles = zip(hidden.split(size, dim=1), uniforms.split(size, dim=1), strict=True)
    return torch.cat([pick(output(states).float().softmax(-1), some) for states, some in tiles], dim=1)
