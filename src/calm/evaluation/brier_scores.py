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
from typing import Any

import torch
from torch import Tensor

from calm.evaluation.branches import Branches
from calm.functional.brier import prefix_equal

NGRAM = 4
_NODES = 512  # branches of a block at once: bounds the attention mask
_TILE_ELEMENTS = 2**24  # of a (positions x vocabulary) tensor: 64 MiB in float32

Draw = Callable[[Tensor], Tensor]  # hidden states [A, D] -> the next patch [A, K]


def score_calm(model: Any, ids: Tensor, starts: Tensor, num_samples: int, draw: Draw) -> tuple[Tensor, Tensor]:
    """Hits and collisions ``[B, P, n]`` of n-grams that start at multiples of K, ``[P]``, in blocks ``[B, T]``.

    Args:
        num_samples: S >= 2; hits average over all draws, collisions over all their pairs.
        draw: independent draws of the patches that follow hidden states.
    """
    patch_size = model.config.patch_size
    outputs = model(ids, use_cache=True)
    check_finite(outputs.last_hidden_state)
    branches = Branches(model.backbone, outputs.past_key_values, ids.shape[1] // patch_size)
    scores = []
    for contexts in (starts // patch_size - 1).split(max(1, 2 * _NODES // num_samples)):
        scores.append(_score_positions(model, ids, contexts, outputs.last_hidden_state, branches, num_samples, draw))
        branches.cut()
    return torch.cat([hit for hit, _ in scores], dim=1), torch.cat([collision for _, collision in scores], dim=1)


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
    states = trunk[:, needed].expand(num_samples, -1, -1, -1)
    drawn = draw(states.flatten(0, 2)).view(num_samples, batch_size, len(needed), patch_size)
    text = ids.unflatten(1, (-1, patch_size))

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
            drawn[of_sample, row, at] = draw(hidden[row, node])
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
    offsets = torch.arange(NGRAM, device=ids.device)
    target = ids[:, starts[:, None] + offsets]
    predicting = trunk[:, starts[:, None] + offsets - 1]  # [B, P, n, D]: states that predict the n-gram's tokens
    hit = _probabilities(model, predicting, target, temperature).cumprod(-1)
    branches = Branches(model.base_model, outputs.past_key_values, ids.shape[1])
    collision = []
    for some in starts.split(max(1, _NODES // num_paths)):
        collision.append(_path_collisions(model, trunk, some - 1, branches, num_paths, generator, temperature))
        branches.cut()
    return hit, torch.cat(collision, dim=1)


def _path_collisions(
    model: Any,
    trunk: Tensor,
    contexts: Tensor,
    branches: Branches,
    num_paths: int,
    generator: torch.Generator,
    temperature: float,
) -> Tensor:
    contexts = contexts.repeat(num_paths).expand(len(trunk), -1)  # [B, paths * P]
    hidden = trunk.gather(1, contexts[..., None].expand(-1, -1, trunk.shape[2]))
    visible = branches.behind(contexts)
    weight = torch.ones(contexts.shape, device=trunk.device)
    collision = []
    for depth in range(NGRAM):
        drawn, probability, same_again = _draw_token(model, hidden, generator, temperature)
        collision.append((weight * same_again).unflatten(1, (num_paths, -1)).mean(1))
        weight = weight * probability
        if depth < NGRAM - 1:
            inputs = model.get_input_embeddings()(drawn)
            hidden, visible = branches.grow(inputs, contexts + depth + 1, visible)
    return torch.stack(collision, dim=-1)


def check_finite(hidden: Tensor) -> None:
    if not hidden.isfinite().all():
        raise ValueError("the model gives NaN or infinity: its weights are damaged, or its training diverged.")


def _tiles(model: Any, hidden: Tensor) -> tuple[Tensor, ...]:
    return hidden.flatten(0, -2).split(max(1, _TILE_ELEMENTS // model.config.vocab_size))


def _law(model: Any, hidden: Tensor, temperature: float) -> Tensor:
    return (model.get_output_embeddings()(hidden).float() / temperature).softmax(-1)


def _probabilities(model: Any, hidden: Tensor, tokens: Tensor, temperature: float) -> Tensor:
    """Probability of given tokens: ``[..., D], [...] -> [...]``."""
    tiles = _tiles(model, hidden)
    wanted = tokens.flatten().split(len(tiles[0]))
    found = [_law(model, h, temperature).gather(-1, t[:, None])[:, 0] for h, t in zip(tiles, wanted, strict=True)]
    return torch.cat(found).view(tokens.shape)


def _draw_token(
    model: Any, hidden: Tensor, generator: torch.Generator, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """A token from every state, its probability, and that of two draws being equal: ``[..., D] -> [...]`` each."""
    drawn, probability, equal = [], [], []
    for tile in _tiles(model, hidden):
        law = _law(model, tile, temperature)
        token = torch.multinomial(law, 1, generator=generator)
        drawn.append(token[:, 0])
        probability.append(law.gather(-1, token)[:, 0])
        equal.append(law.square().sum(-1))
    shape = hidden.shape[:-1]
    return torch.cat(drawn).view(shape), torch.cat(probability).view(shape), torch.cat(equal).view(shape)
