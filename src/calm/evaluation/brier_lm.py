"""BrierLM of language models: CALM with any patch size, and token models, on the same n-grams.

An n-gram is scored where it starts at a multiple of ``stride`` behind at least one stride of context; with the stride a
multiple of every model's patch size, all models are scored on the same n-grams.

Shapes: B blocks, P scored positions, n = 4 tokens of an n-gram.
"""

import hashlib
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from calm.data.blocks import TokenBlocks, shuffled
from calm.evaluation.brier_scores import Draw, score_calm, score_token_model, scored_positions
from calm.evaluation.statistics import brier_errors, error_to_stop_at
from calm.functional.brier import NGRAM, brier_lm
from calm.generation.model_runner import model_runner
from calm.generation.samplers import find_sampler
from calm.generation.sampling_params import DEFAULTS, SamplingParams
from calm.models.capabilities import check_full_attention, check_plain_logits
from calm.models.configuration_calm import CalmConfig
from calm.models.context import check_context
from calm.models.layer_access import device_of
from calm.models.modeling_calm import CalmForCausalLM

_STATES_AT_ONCE = 4096  # hidden states that CALM's head draws from together
_MOST_PATHS = 2  # of a token model


@dataclass
class BrierResult:
    """A BrierLM score and what it was measured on. Brier scores, accuracies and collisions are times 100."""

    brier_lm: float
    brier_lm_error: float | None  # standard error over documents or runs of blocks; None for fewer than 32 blocks
    brier: list[float]  # Brier-1 to Brier-4, not floored
    brier_error: list[float] | None
    accuracy: list[float]  # probability that a draw agrees with the text on the first 1..4 tokens
    collision: list[float]  # probability that two draws agree with each other
    block_brier: list[list[float]]  # Brier-1 to Brier-4 of every block in the order of the text, to compare models
    block_documents: list[int] | None  # number of the document of every block; None where it is unknown
    num_positions: int
    num_blocks: int
    block_size: int  # tokens, the longest context
    stride: int
    num_samples: int
    temperature: float
    sampler: str | None  # of a CALM
    seed: int
    data_sha256: str  # of the scored blocks' tokens, as int64
    seconds: float

    def to_dict(self) -> dict:
        return asdict(self)


@torch.no_grad()
def evaluate_brier(
    model: PreTrainedModel,
    blocks: TokenBlocks,
    stride: int,
    *,
    num_blocks: int | None = None,
    num_samples: int = 4,
    batch_size: int = 8,
    seed: int = 0,
    advance: Callable[[int], None] | None = None,
    temperature: float = 1.0,
    num_candidates: int = DEFAULTS["num_candidates"],
    target_error: float | None = None,
    sampler: str = "batch",
) -> BrierResult:
    """Score a language model on blocks of text.

    Args:
        model: a :class:`CalmForCausalLM` or a token model of transformers.
        blocks: the text; ``blocks.block_size`` is the longest context and part of the protocol.
        stride: tokens between scored positions, a multiple of the model's patch size.
        num_blocks: so many blocks, evenly spread over the text; default all.
        num_samples: S >= 2 draws per position, of which all pairs are compared. For a token model, whose probabilities
            need no draws, S / 2 paths, and no more than two: the error is that of the text then.
        advance: called with the number of blocks after every batch.
        temperature: of the draws. The scores of the paper are those of temperature 1.
        num_candidates: of CALM's batch sampler below temperature 1.
        target_error: stop when the standard error of BrierLM is this low, after 32 blocks at the earliest. The blocks
            are scored in random order then.
        sampler: of CALM's draws, as :meth:`~calm.generation.loop.CalmGenerationMixin.generate` has it.
            ``"mtp"`` scores what the hidden states say of the next patch, whatever the head makes of it:
            far above the head's own score, it is the head that limits the model.
    """
    is_calm = isinstance(model, CalmForCausalLM)
    _check_request(model, blocks, stride, num_samples, num_blocks)
    how: dict[str, Any] = {"sampler": sampler, "num_candidates": num_candidates} if is_calm else {}
    params = model_runner(model).resolve(SamplingParams(temperature=temperature, top_p=1.0, **how))
    if target_error is not None and not target_error > 0:
        raise ValueError(f"target_error must be above 0, got {target_error}.")
    device = device_of(model)
    generator = torch.Generator(device).manual_seed(seed)
    started = time.perf_counter()
    was_training = model.training
    model.eval()
    hits, collisions = [], []
    data_hash = hashlib.sha256()
    documents = torch.tensor(blocks.documents(num_blocks))
    starts = scored_positions(blocks.block_size, stride).to(device)
    shuffle_seed = None if target_error is None else seed
    order = torch.tensor(shuffled(range(min(num_blocks or len(blocks), len(blocks))), shuffle_seed))
    for ids in blocks.batches(num_blocks, batch_size, shuffle_seed):
        data_hash.update(ids.numpy().tobytes())
        ids = ids.to(device)
        if is_calm:
            draw = _drawer(model, params, generator)
            hit, collision = score_calm(model, ids, starts, num_samples, draw)
        else:
            paths = min(num_samples // 2, _MOST_PATHS)
            hit, collision = score_token_model(model, ids, starts, paths, generator, temperature)
        hits.append(hit.mean(1).cpu().double())  # [B, n]
        collisions.append(collision.mean(1).cpu().double())
        if advance is not None:
            advance(len(ids))
        if target_error is not None:
            scored = order[: sum(map(len, hits))]
            in_order = scored.argsort()
            brier = (2 * torch.cat(hits) - torch.cat(collisions))[in_order]
            if error_to_stop_at(brier, documents[scored[in_order]].tolist()) <= target_error:
                break
    model.train(was_training)
    scored = order[: sum(map(len, hits))]
    in_order = scored.argsort()  # errors depend on which blocks are neighbours
    hit, collision = torch.cat(hits)[in_order], torch.cat(collisions)[in_order]
    return summarise(
        hit,
        collision,
        documents[scored[in_order]].tolist(),
        num_positions=len(starts) * len(hit),
        block_size=blocks.block_size,
        stride=stride,
        num_samples=num_samples,
        temperature=temperature,
        sampler=params.sampler,
        seed=seed,
        data_sha256=data_hash.hexdigest(),
        seconds=time.perf_counter() - started,
    )


def summarise(hit: Tensor, collision: Tensor, documents: list[int] | None = None, **protocol: Any) -> BrierResult:
    """Return means over blocks and their standard errors.

    Args:
        hit, collision: mean of each block ``[blocks, n]``, in the order of the text.
        documents: number of the document of each block, where it is known.
        protocol: the other fields of the result.
    """
    brier = 2 * hit - collision
    errors = brier_errors(brier, documents)

    def percent(values: Tensor) -> list[float]:
        return [100 * value for value in values.tolist()]

    return BrierResult(
        brier_lm=brier_lm(brier.mean(0)).item(),
        brier_lm_error=None if errors is None else errors[0],
        brier=percent(brier.mean(0)),
        brier_error=None if errors is None else [100 * error for error in errors[1]],
        accuracy=percent(hit.mean(0)),
        collision=percent(collision.mean(0)),
        block_brier=[[round(value, 4) for value in percent(block)] for block in brier],
        block_documents=documents,
        num_blocks=len(brier),
        **protocol,
    )


def _drawer(model: Any, params: SamplingParams, generator: torch.Generator) -> Draw:
    assert params.sampler is not None
    has_probabilities = find_sampler(params.sampler).has_probabilities

    def draw(hidden: Tensor, count: int, text: Tensor | None) -> Tensor:
        size = max(1, _STATES_AT_ONCE // count)
        texts = text.split(size) if text is not None else [None] * len(hidden)
        tiles = zip(hidden.split(size), texts, strict=False)
        if text is None or params.temperature != 1 or has_probabilities:
            several = [model.sample_patch(tile.repeat(count, 1), params, generator).tokens for tile, _ in tiles]
            return torch.cat([chunks.unflatten(0, (count, -1)) for chunks in several], dim=1)
        return torch.cat([_draw_beside_text(model, tile, count, beside, generator) for tile, beside in tiles], dim=1)

    return draw


def _draw_beside_text(model: Any, hidden: Tensor, count: int, text: Any, generator: torch.Generator) -> Tensor:
    """Draws ``[count, A, K]``, decoded only while they agree with the text or with each other."""
    draws = model.lazy_samples(hidden, generator)
    draws.sample(count)
    with_text = torch.ones(draws.tokens.shape[:2], dtype=torch.bool, device=hidden.device)  # [A, count]
    with_other = ~torch.eye(count, dtype=torch.bool, device=hidden.device).expand(len(hidden), -1, -1)
    for position in range(min(text.shape[1], NGRAM)):
        token = draws.decode(with_text | with_other.any(-1), position)
        with_text = with_text & (token == text[:, position, None])
        with_other = with_other & (token[:, :, None] == token[:, None])
    nothing = -1 - torch.arange(count, device=hidden.device)[:, None, None]
    tokens = draws.tokens.movedim(1, 0)
    return torch.where(tokens < 0, nothing, tokens)


def check_scorable(config: Any) -> None:
    """ValueError for a language model, by its configuration, that can be trained and not scored."""
    check_full_attention(getattr(config, "backbone_config", config), "scored")
    if not isinstance(config, CalmConfig):
        check_plain_logits(config, "scored")


def _check_request(
    model: PreTrainedModel, blocks: TokenBlocks, stride: int, num_samples: int, num_blocks: int | None
) -> None:
    is_calm = isinstance(model, CalmForCausalLM)
    patch_size = model.config.patch_size if is_calm else 1
    if stride < 1 or stride % patch_size:
        raise ValueError(f"stride must be a multiple of the model's patch size {patch_size}, got {stride}.")
    if num_samples < 2:
        raise ValueError(f"num_samples must be at least 2 (draws are compared in pairs), got {num_samples}.")
    if num_blocks is not None and num_blocks < 1:
        raise ValueError(f"num_blocks must be at least 1, or None for all, got {num_blocks}.")
    if blocks.block_size < stride + NGRAM:
        raise ValueError(
            f"block_size must be at least {stride + NGRAM} to hold a scored n-gram, got {blocks.block_size}."
        )
    check_context(model.config, blocks.block_size, patch_size)
    vocab_size = blocks.manifest["vocab_size"]
    if vocab_size > model.config.vocab_size:
        raise ValueError(
            f"the data hold {vocab_size} tokens, the model knows {model.config.vocab_size}: not its tokenizer."
        )
    check_scorable(model.config)
