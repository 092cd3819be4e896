"""BrierLM of language models: CALM with any patch size, and token models, on the same n-grams.

For every scored position S independent continuations are drawn and compared with the text and with each other. A
position is scored where an n-gram starts at a multiple of ``stride`` behind at least one stride of context; with the
stride a multiple of every model's patch size, all models are scored on the same n-grams.

All continuations of a block are drawn together: each is a branch on the tree whose trunk is the block itself, sees the
trunk up to its start and its own tokens, and has the rotary positions it would have alone.

Shapes: B blocks, T tokens of a block, P scored positions, S continuations, n = 4 tokens of an n-gram, K tokens of a
patch, D hidden, V vocabulary.
"""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from calm.data.blocks import TokenBlocks
from calm.functional.brier import brier_lm, prefix_equal
from calm.models.modeling_calm import CalmForCausalLM

NGRAM = 4
_TILE_ELEMENTS = 2**24  # of a (positions x vocabulary) tensor: 64 MiB in float32
_BOOTSTRAP_ROUNDS = 1000
# What some token models do to logits or attention, and this file does not.
_UNSUPPORTED = ("final_logit_softcapping", "logits_scaling", "logit_scale", "sliding_window")


@dataclass
class BrierResult:
    """A BrierLM score and what it was measured on. Brier scores, accuracies and collisions are times 100."""

    brier_lm: float
    brier_lm_error: float  # standard error, by bootstrap over blocks
    brier: list[float]  # Brier-1 to Brier-4, not floored
    brier_error: list[float]
    accuracy: list[float]  # share of draws that agree with the text on the first 1..4 tokens
    collision: list[float]  # share of pairs of draws that agree with each other
    num_positions: int
    num_blocks: int
    block_size: int
    stride: int
    num_samples: int
    seed: int
    seconds: float

    def to_dict(self) -> dict:
        return asdict(self)


@torch.no_grad()
def evaluate_brier(
    model: PreTrainedModel,
    blocks: TokenBlocks,
    stride: int,
    num_blocks: int | None = None,
    num_samples: int = 4,
    batch_size: int = 8,
    seed: int = 0,
    advance: Callable[[int], None] | None = None,
) -> BrierResult:
    """Score a language model on blocks of text.

    Args:
        model: a :class:`CalmForCausalLM` or a token model of transformers.
        blocks: the text; ``blocks.block_size`` is the longest context and part of the protocol.
        stride: tokens between scored positions, a multiple of the model's patch size.
        num_blocks: so many blocks, evenly spread over the text; default all.
        num_samples: S >= 2 continuations per position; all pairs are compared.
        advance: called with the number of blocks after every batch.
    """
    patch_size = model.config.patch_size if isinstance(model, CalmForCausalLM) else 1
    if stride < 1 or stride % patch_size:
        raise ValueError(f"stride must be a multiple of the model's patch size {patch_size}, got {stride}.")
    if num_samples < 2:
        raise ValueError(f"num_samples must be at least 2 (draws are compared in pairs), got {num_samples}.")
    if blocks.block_size < stride + NGRAM:
        raise ValueError(
            f"block_size must be at least {stride + NGRAM} to hold a scored n-gram, got {blocks.block_size}."
        )
    vocab_size = blocks.manifest["vocab_size"]
    if vocab_size > model.config.vocab_size:
        raise ValueError(
            f"the data hold {vocab_size} tokens, the model knows {model.config.vocab_size}: not its tokenizer."
        )
    generator = torch.Generator(model.device).manual_seed(seed)
    score: Callable[..., tuple[Tensor, Tensor]] = (
        _score_calm if isinstance(model, CalmForCausalLM) else _score_token_model
    )

    started = time.perf_counter()
    was_training = model.training
    model.eval()
    per_block = []
    starts = torch.arange(stride, blocks.block_size - NGRAM + 1, stride, device=model.device)
    for ids in blocks.batches(num_blocks, batch_size):
        hit, collision = score(model, ids.to(model.device), starts, num_samples, generator)
        per_block.append(torch.stack([hit, collision]).mean(2).double().cpu())  # [2, B, n]
        if advance is not None:
            advance(len(ids))
    model.train(was_training)
    hit, collision = torch.cat(per_block, dim=1)
    return summarise(
        hit,
        collision,
        num_positions=len(starts) * len(hit),
        block_size=blocks.block_size,
        stride=stride,
        num_samples=num_samples,
        seed=seed,
        seconds=time.perf_counter() - started,
    )


def summarise(hit: Tensor, collision: Tensor, **protocol: Any) -> BrierResult:
    """Means over blocks and their standard errors by bootstrap.

    Args:
        hit, collision: mean of each block ``[blocks, n]``.
        protocol: the other fields of the result.
    """
    brier = 2 * hit - collision
    num_blocks = len(brier)
    pick = torch.randint(num_blocks, (_BOOTSTRAP_ROUNDS, num_blocks), generator=torch.Generator().manual_seed(0))
    resampled = brier[pick].mean(1)  # [rounds, n]

    def percent(values: Tensor) -> list[float]:
        return [100 * value for value in values.tolist()]

    return BrierResult(
        brier_lm=brier_lm(brier.mean(0)).item(),
        brier_lm_error=brier_lm(resampled).std().item(),
        brier=percent(brier.mean(0)),
        brier_error=percent(resampled.std(0)),
        accuracy=percent(hit.mean(0)),
        collision=percent(collision.mean(0)),
        num_blocks=num_blocks,
        **protocol,
    )


def _check_finite(hidden: Tensor) -> None:
    if not hidden.isfinite().all():
        raise ValueError("the model gives NaN or infinity: its weights are damaged, or its training diverged.")


def _targets(ids: Tensor, starts: Tensor) -> Tensor:
    """The n-grams of the text: ``[B, T], [P] -> [B, P, n]``."""
    return ids[:, starts[:, None] + torch.arange(NGRAM, device=ids.device)]


def _pairs(num_samples: int) -> list[tuple[int, int]]:
    return [(first, second) for first in range(num_samples) for second in range(first)]


def _score_calm(
    model: CalmForCausalLM, ids: Tensor, starts: Tensor, num_samples: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Share of hits and of collisions, ``[B, P, n]`` each, from S draws per position."""
    patch_size = model.config.patch_size
    contexts = starts // patch_size - 1  # the patch whose hidden state predicts the n-gram's first patch
    outputs = model(ids, use_cache=True)
    _check_finite(outputs.last_hidden_state)
    hidden_BSPD = outputs.last_hidden_state[:, None, contexts].expand(-1, num_samples, -1, -1)
    chunks: list[Tensor] = []
    tree = _Tree(contexts, ids.shape[1] // patch_size, num_samples, outputs.past_key_values)
    while True:
        latents = model.head.sample(hidden_BSPD, generator=generator)
        chunks.append(model.autoencoder.decode_tokens(latents))  # [B, S, P, K]
        if len(chunks) * patch_size >= NGRAM:
            break
        embeddings = model.embed_patches(chunks[-1].flatten(1))  # [B, S * P, D]
        hidden_BSPD = tree.grow(model.backbone, embeddings)
    drawn = torch.cat(chunks, dim=-1)[..., :NGRAM].movedim(1, 0)  # [S, B, P, n]
    target = _targets(ids, starts)
    hit = torch.stack([prefix_equal(one, target) for one in drawn]).mean(0)
    collision = torch.stack([prefix_equal(drawn[i], drawn[j]) for i, j in _pairs(num_samples)]).mean(0)
    return hit, collision


def _score_token_model(
    model: PreTrainedModel, ids: Tensor, starts: Tensor, num_samples: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """As for CALM, with less variance: hits are exact, and so is the collision of an n-gram's last token."""
    for name in _UNSUPPORTED:
        if getattr(model.config, name, None) not in (None, 1, 1.0, False):
            raise ValueError(
                f"{type(model).__name__} with {name} cannot be scored: only full attention and plain logits."
            )
    outputs = model.base_model(ids, use_cache=True)
    trunk = outputs.last_hidden_state
    _check_finite(trunk)
    target = _targets(ids, starts)
    offsets = torch.arange(NGRAM, device=ids.device) - 1
    predicting = trunk[:, starts[:, None] + offsets]  # [B, P, n, D]: states that predict the n-gram's tokens
    hit = _probabilities(model, predicting, target).cumprod(-1)

    hidden_BSPD = trunk[:, None, starts - 1].expand(-1, num_samples, -1, -1)
    tree = _Tree(starts - 1, ids.shape[1], num_samples, outputs.past_key_values)
    agree = torch.ones((len(_pairs(num_samples)), *target.shape[:2]), device=ids.device)  # [pairs, B, P]
    collision = []
    for depth in range(NGRAM):
        drawn, same_again = _draw(model, hidden_BSPD, generator)  # [B, S, P] each
        # Two draws with one prefix collide on the next token with probability sum_v P(v)^2, whatever they drew.
        collision.append(
            torch.stack(
                [both * same_again[:, i] for both, (i, _) in zip(agree, _pairs(num_samples), strict=True)]
            ).mean(0)
        )
        if depth < NGRAM - 1:
            same = torch.stack([drawn[:, i] == drawn[:, j] for i, j in _pairs(num_samples)])
            agree = agree * same
            hidden_BSPD = tree.grow(model.base_model, model.get_input_embeddings()(drawn.flatten(1)))
    return hit, torch.stack(collision, dim=-1)


def _rows_per_tile(model: PreTrainedModel) -> int:
    return max(1, _TILE_ELEMENTS // model.config.vocab_size)


def _probabilities(model: PreTrainedModel, hidden: Tensor, tokens: Tensor) -> Tensor:
    """Probability of given tokens: ``[..., D], [...] -> [...]``."""
    head = model.get_output_embeddings()
    tiles = zip(
        hidden.flatten(0, -2).split(_rows_per_tile(model)), tokens.flatten().split(_rows_per_tile(model)), strict=True
    )
    found = [head(h).float().softmax(-1).gather(-1, t[:, None])[:, 0] for h, t in tiles]
    return torch.cat(found).view(tokens.shape)


def _draw(model: PreTrainedModel, hidden: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A token from every state, and the probability that two such draws are equal: ``[..., D] -> [...], [...]``."""
    head = model.get_output_embeddings()
    tokens, equal = [], []
    for tile in hidden.flatten(0, -2).split(_rows_per_tile(model)):
        probabilities = head(tile).float().softmax(-1)
        tokens.append(torch.multinomial(probabilities, 1, generator=generator)[:, 0])
        equal.append(probabilities.square().sum(-1))
    return torch.cat(tokens).view(hidden.shape[:-1]), torch.cat(equal).view(hidden.shape[:-1])


class _Tree:
    """Branches on a block: S continuations of each of P positions, one node longer with every :meth:`grow`."""

    def __init__(self, contexts: Tensor, length: int, num_samples: int, cache: Cache):
        self.cache = cache
        self.contexts = contexts.repeat(num_samples)  # [S * P], the trunk node a branch starts behind
        self.num_samples = num_samples
        self.depth = 0
        trunk = torch.arange(length, device=contexts.device)
        self.visible = trunk <= self.contexts[:, None]  # [S * P, nodes so far]

    def grow(self, backbone: torch.nn.Module, embeddings: Tensor) -> Tensor:
        """Append one node to every branch: inputs ``[B, S * P, D]`` -> hidden states ``[B, S, P, D]``."""
        self.depth += 1
        own = torch.eye(len(self.contexts), dtype=torch.bool, device=embeddings.device)
        self.visible = torch.cat([self.visible, own], dim=1)
        mask = torch.zeros(self.visible.shape, dtype=embeddings.dtype, device=embeddings.device)
        mask = mask.masked_fill(~self.visible, torch.finfo(embeddings.dtype).min)
        outputs = backbone(
            inputs_embeds=embeddings,
            attention_mask=mask.expand(len(embeddings), 1, -1, -1),
            position_ids=(self.contexts + self.depth).expand(len(embeddings), -1),
            past_key_values=self.cache,
            use_cache=True,
        )
        return outputs.last_hidden_state.unflatten(1, (self.num_samples, -1))
