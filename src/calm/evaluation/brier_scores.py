"""Hits and collisions of the n-grams that a model continues a block with: what the Brier score is made of.

The *hit* of an n-gram is the model's probability of the text, its *collision* the probability that two draws agree.
Both are estimated without bias for every prefix of the n-gram, and with little work:

- Hits follow the text, so they need no continuations: the next patch is drawn at every position of the block.
- Two draws can agree on a further patch only where they agree on all before. Only there a branch grows, one for all
  draws that agree; where none do, nothing is computed.
- A token model gives its probabilities. Hits are exact, and one drawn path x weighs with them: the expectation of
  P(x) * sum_v P(v | x)^2 is the collision of an n-gram one longer than x.

Shapes: B blocks, T tokens of a block, P scored positions, S draws, n = 4 tokens of an n-gram, K tokens of a patch,
D hidden.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from calm.evaluation.branches import Branches
from calm.functional.brier import NGRAM, prefix_equal
from calm.functional.rng import categorical
from calm.functional.temperature import sharpened
from calm.functional.tiles import rows_at_once
from calm.generation.loop import check_finite

# Of a (positions x vocabulary) tensor: 4 MiB in float32, which caches hold, unless that is but a few positions.
_TILE_ELEMENTS, _TILE_ROWS = 2**20, 128

# draw(hidden states [A, D], count, text [A, K] or None): independent draws of the patches that follow, [count, A, K].
# Given the text that stands there, tokens may be left out (distinct negative numbers in their place) behind the first
# in which a draw differs both from the text and from all other draws of its state.
Draw = Callable[[Tensor, int, Tensor | None], Tensor]


def scored_positions(block_size: int, stride: int) -> Tensor:
    """Where n-grams start in a block: at multiples of ``stride`` behind at least one stride of context, ``[P]``."""
    return torch.arange(stride, block_size - NGRAM + 1, stride)


def score_calm(model: Any, ids: Tensor, starts: Tensor, num_samples: int, draw: Draw) -> tuple[Tensor, Tensor]:
    """Hits and collisions ``[B, P, n]`` of n-grams that start at multiples of K, ``[P]``, in blocks ``[B, T]``.

    Args:
        num_samples: S >= 2; hits average over all draws, collisions over all their pairs.
    """
    patch_size = model.config.patch_size
    outputs = model(ids, use_cache=True)
    check_finite(outputs.last_hidden_state)
    branches = Branches(model.backbone, outputs.past_key_values, ids.shape[1] // patch_size)
    trunk = outputs.last_hidden_state
    scores = [
        _score_positions(model, ids, contexts, trunk, branches, num_samples, draw)
        for contexts in branches.backwards(starts // patch_size - 1, num_samples // 2)  # groups of two or more draws
    ]
    hits, collisions = zip(*reversed(scores), strict=True)
    return torch.cat(hits, dim=1), torch.cat(collisions, dim=1)


def _score_positions(
    model: Any, ids: Tensor, contexts: Tensor, trunk: Tensor, branches: Branches, num_samples: int, draw: Draw
) -> tuple[Tensor, Tensor]:
    """As :func:`score_calm`, for the patches behind some positions of the trunk ``[P]``."""
    patch_size, batch_size = model.config.patch_size, len(ids)
    num_patches = -(-NGRAM // patch_size)
    # The patch behind every position of the trunk that a hit needs; neighbours share them.
    steps = contexts[:, None] + torch.arange(num_patches, device=ids.device)  # [P, patches of an n-gram]
    needed = steps.unique()
    index = torch.searchsorted(needed, steps)
    text = ids.unflatten(1, (-1, patch_size))
    drawn = draw(trunk[:, needed].flatten(0, 1), num_samples, text[:, needed + 1].flatten(0, 1))
    drawn = drawn.unflatten(1, (batch_size, len(needed)))

    hit, before = [], torch.ones((batch_size, len(contexts)), device=ids.device)
    for step in range(num_patches):
        width = min(patch_size, NGRAM - step * patch_size)
        here = drawn[:, :, index[:, step]]
        equal = prefix_equal(here, text[:, steps[:, step] + 1].expand_as(here)).mean(0)  # [B, P, K]
        hit.append(before[..., None] * equal[..., :width])
        before = before * equal[..., -1]
    collision = _collisions(model, contexts, drawn[:, :, index[:, 0]], branches, num_patches, draw)
    return torch.cat(hit, dim=-1), collision


def _collisions(
    model: Any, contexts: Tensor, drawn: Tensor, branches: Branches, num_patches: int, draw: Draw
) -> Tensor:
    """Share of pairs of continuations that agree ``[B, P, n]``, from draws of the first patch ``[S, B, P, K]``."""
    num_samples, batch_size, num_positions, patch_size = drawn.shape
    apart = ~torch.eye(num_samples, dtype=torch.bool, device=drawn.device)[:, :, None, None]
    number = torch.arange(num_samples, device=drawn.device)[:, None, None]
    agree = torch.ones((num_samples, num_samples, batch_size, num_positions), dtype=torch.bool, device=drawn.device)
    collision: list[Tensor] = []
    place: Tensor | None = None
    visible: Tensor | None = None
    leader: Tensor | None = None
    for step in range(num_patches):
        if step > 0:
            # Draws that agree so far are a group, led by its first; every group of two or more grows one node.
            led_by = leader
            leader = agree.long().argmax(1)  # [S, B, P]
            in_group = agree.sum(1) > 1
            leads = (in_group & (leader == number)).permute(1, 2, 0).flatten(1)  # [B, P * S]
            count = int(leads.sum(1).max())
            if count == 0:
                break
            chosen = leads.long().argsort(dim=1, descending=True, stable=True)[:, :count]  # [B, nodes]
            position, sample = chosen // num_samples, chosen % num_samples
            where = contexts[position]
            if visible is None:
                visible = branches.behind(where)
            else:
                assert place is not None
                assert led_by is not None
                parent = place.gather(1, position * num_samples + _pick(led_by, position, sample))
                visible = visible.gather(1, parent.clamp(min=0)[..., None].expand(-1, -1, visible.shape[2]))
            place = torch.full_like(leads, -1, dtype=torch.long).scatter(
                1, chosen, torch.arange(count, device=chosen.device).expand(batch_size, -1)
            )
            tokens = _pick(drawn, position, sample).clamp(min=0)  # of blocks with fewer groups, anything
            hidden, visible = branches.grow(model.embed_patches(tokens.flatten(1)), where + step, visible)
            # Every member of a group draws its own next patch; the others never agree with anybody again.
            drawn = (-1 - number)[..., None].expand_as(drawn).clone()
            of_sample, row, at = in_group.nonzero(as_tuple=True)
            node = place[row, at * num_samples + leader[of_sample, row, at]]
            drawn[of_sample, row, at] = draw(hidden[row, node], 1, None)[0]
        equal = prefix_equal(drawn[:, None], drawn[None]) * (agree & apart)[..., None]  # [S, S, B, P, K]
        width = min(patch_size, NGRAM - step * patch_size)
        collision.append(equal[..., :width].sum((0, 1)) / (num_samples * (num_samples - 1)))
        agree = agree & (drawn[:, None] == drawn[None]).all(-1)
    found = torch.cat(collision, dim=-1)
    return torch.nn.functional.pad(found, (0, NGRAM - found.shape[-1]))


def _pick(values: Tensor, position: Tensor, sample: Tensor) -> Tensor:
    """Of every block some positions and samples: ``[S, B, P, ...], [B, nodes], [B, nodes] -> [B, nodes, ...]``."""
    row = torch.arange(len(position), device=position.device)[:, None]
    return values[sample, row, position]


def score_token_model(
    model: Any, ids: Tensor, starts: Tensor, num_paths: int, generator: torch.Generator, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """As :func:`score_calm`, for a token model: exact hits, and collisions from ``num_paths`` drawn paths."""
    outputs = model.base_model(ids, use_cache=True)
    trunk = outputs.last_hidden_state
    check_finite(trunk)
    steps = starts[:, None] - 1 + torch.arange(NGRAM, device=ids.device)  # [P, n]: states that predict the n-gram
    needed = steps.unique()
    index = torch.searchsorted(needed, steps)
    token = _look(model, trunk[:, needed], ids[:, needed + 1], num_paths, generator, temperature)
    hit = token.of_text[:, index].cumprod(-1)
    branches = Branches(model.base_model, outputs.past_key_values, ids.shape[1])
    collision = []
    for some in branches.backwards(starts - 1, num_paths):
        at = torch.searchsorted(needed, some)
        first = (token.same_again[:, at], token.drawn[:, at], token.probability[:, at])
        collision.append(_path_collisions(model, some, *first, branches, generator, temperature))
    return hit, torch.cat(collision[::-1], dim=1)


def _path_collisions(
    model: Any,
    contexts: Tensor,
    same_again: Tensor,
    drawn: Tensor,
    probability: Tensor,
    branches: Branches,
    generator: torch.Generator,
    temperature: float,
) -> Tensor:
    """Collisions ``[B, P, n]`` from what is known of the first token ``[B, P]`` and the paths' draws of it."""
    num_paths = drawn.shape[2]
    collision = [same_again]
    # Paths become nodes: [B, P, paths] -> [B, P * paths].
    where = contexts.repeat_interleave(num_paths).expand(len(drawn), -1)
    visible = branches.behind(where)
    drawn, weight = drawn.flatten(1), probability.flatten(1)
    for depth in range(1, NGRAM):
        inputs = model.get_input_embeddings()(drawn)
        hidden, visible = branches.grow(inputs, where + depth, visible)
        token = _look(model, hidden, None, 1 if depth < NGRAM - 1 else 0, generator, temperature)
        collision.append((weight * token.same_again).unflatten(1, (-1, num_paths)).mean(2))
        if depth < NGRAM - 1:
            drawn, weight = token.drawn[..., 0], weight * token.probability[..., 0]
    return torch.stack(collision, dim=-1)


@dataclass
class _NextToken:
    """What is asked of the next token's probabilities, of every state ``[...]``."""

    same_again: Tensor  # probability that two draws are equal, [...]
    of_text: Tensor  # probability of a given token, [...]
    drawn: Tensor  # draws, [..., n]
    probability: Tensor  # of the draws, [..., n]


def _look(
    model: Any,
    hidden: Tensor,
    text: Tensor | None,
    num_draws: int,
    generator: torch.Generator,
    temperature: float,
) -> _NextToken:
    """The next token at states ``[..., D]``, a tile at a time: the logits of all states are never held."""
    states = hidden.flatten(0, -2)
    tile_size = max(_TILE_ROWS, rows_at_once(model.config.vocab_size, states.device, _TILE_ELEMENTS))
    given = torch.zeros(len(states), dtype=torch.long, device=hidden.device) if text is None else text.flatten()
    found: list[tuple[Tensor, ...]] = []
    for tile, token in zip(states.split(tile_size), given.split(tile_size), strict=True):
        probs = sharpened(model.get_output_embeddings()(tile), temperature)
        drawn = torch.empty((len(tile), 0), dtype=torch.long, device=tile.device)
        if num_draws:
            drawn = categorical(probs, num_draws, generator)
        found.append(
            (torch.linalg.vecdot(probs, probs), probs.gather(-1, token[:, None])[:, 0], drawn, probs.gather(-1, drawn))
        )
    parts = [torch.cat(several) for several in zip(*found, strict=True)]
    return _NextToken(*(part.unflatten(0, hidden.shape[:-1]) for part in parts))
