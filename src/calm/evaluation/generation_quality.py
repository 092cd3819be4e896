"""How fluent generated texts are: what another model thinks of them, how they repeat themselves, how fast they come.

Perplexity alone can be fooled: a text that goes in circles is easy to predict. So it stands beside repetition and
diversity, and beside the same figures of the text that people wrote.
"""

import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from calm.data.blocks import TokenBlocks
from calm.data.text import decode_continuation
from calm.generation.completions import continue_tokens, until_end
from calm.generation.sampling_params import SamplingParams

_AT_ONCE = 16
_REPEATED = 4  # tokens of an n-gram that counts as said again
_DISTINCT = (1, 2, 4)


@dataclass
class FluencyResult:
    """Of texts that continue prompts from held-out documents; the prompts themselves do not count."""

    perplexity: float  # of the judge
    repetition: float  # share of 4-grams that stand in the same text before
    distinct: dict[str, float]  # different n-grams per n-gram, over all texts
    tokens_per_second: float | None  # one batch of 16 texts at a time; None of the documents
    temperature: float | None
    sampler: str | None  # as given; None of the documents, of a token model, and for what the model's files say
    num_texts: int
    num_tokens: int
    samples: list[dict[str, str]]  # the first few: prompt, text

    def to_dict(self) -> dict:
        return asdict(self)


@torch.no_grad()
def evaluate_fluency(
    model: PreTrainedModel,
    judge: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    blocks: TokenBlocks,
    num_texts: int = 64,
    prompt_tokens: int = 32,
    new_tokens: int = 64,
    temperature: float = 1.0,
    seed: int = 0,
    sampler: str | None = None,
) -> FluencyResult:
    """Let a model continue the beginnings of held-out blocks, and judge what it writes.

    Args:
        judge: a token model with the same tokenizer.
        prompt_tokens: of every prompt, a multiple of the model's patch size.
        seed: text i has the random numbers of seed + i (a token model's those of its batch).
        sampler: of a CALM; default what its files say.
    """
    prompts = _beginnings(blocks, num_texts, prompt_tokens)
    texts: list[list[int]] = []
    started = time.perf_counter()
    for first in range(0, len(prompts), _AT_ONCE):
        batch = prompts[first : first + _AT_ONCE].to(model.device)
        settings = SamplingParams(temperature, sampler, max_new_tokens=new_tokens, seed=seed)
        texts += continue_tokens(model, tokenizer, batch, torch.ones_like(batch), settings, first=first)[0]
    rate = sum(map(len, texts)) / (time.perf_counter() - started)
    return _judged(judge, tokenizer, prompts, texts, rate, temperature, sampler)


@torch.no_grad()
def fluency_of_text(
    judge: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    blocks: TokenBlocks,
    num_texts: int = 64,
    prompt_tokens: int = 32,
    new_tokens: int = 64,
) -> FluencyResult:
    """The same figures of how the documents themselves go on, up to their ends, where generated texts stop too."""
    whole = _beginnings(blocks, num_texts, prompt_tokens + new_tokens)
    texts = [until_end(text, tokenizer) for text in whole[:, prompt_tokens:].tolist()]
    return _judged(judge, tokenizer, whole[:, :prompt_tokens], texts)


def _beginnings(blocks: TokenBlocks, num_blocks: int, length: int) -> Tensor:
    if length > blocks.block_size:
        raise ValueError(f"prompts and texts of {length} tokens do not fit into blocks of {blocks.block_size}.")
    return torch.cat([batch[:, :length] for batch in blocks.batches(num_blocks, _AT_ONCE)])


def _judged(
    judge: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Tensor,
    texts: list[list[int]],
    rate: float | None = None,
    temperature: float | None = None,
    sampler: str | None = None,
) -> FluencyResult:
    surprise, count, again, grams = 0.0, 0, 0, 0
    for prompt, text in zip(prompts.tolist(), texts, strict=True):
        surprise += _surprise(judge, prompt, text)
        count += len(text)
        seen: set[tuple[int, ...]] = set()
        for gram in _grams(text, _REPEATED):
            again += gram in seen
            seen.add(gram)
            grams += 1
    several = {n: [gram for text in texts for gram in _grams(text, n)] for n in _DISTINCT}
    return FluencyResult(
        perplexity=math.exp(surprise / max(1, count)),
        repetition=again / max(1, grams),
        distinct={str(n): len(set(all_of_n)) / max(1, len(all_of_n)) for n, all_of_n in several.items()},
        tokens_per_second=rate,
        temperature=temperature,
        sampler=sampler,
        num_texts=len(texts),
        num_tokens=count,
        samples=[
            {"prompt": str(tokenizer.decode(prompt)), "text": decode_continuation(tokenizer, prompt, text)}
            for prompt, text in zip(prompts.tolist()[:4], texts, strict=False)
        ],
    )


def _surprise(judge: Any, prompt: list[int], text: list[int]) -> float:
    """Nats of the judge for a text behind its prompt."""
    if not text:
        return 0.0
    ids = torch.tensor([prompt + text], device=judge.device)
    logits = judge(ids).logits[0, len(prompt) - 1 : -1].float()
    return float(torch.nn.functional.cross_entropy(logits, ids[0, len(prompt) :], reduction="sum"))


def _grams(tokens: list[int], n: int) -> Iterator[tuple[int, ...]]:
    return (tuple(tokens[place : place + n]) for place in range(len(tokens) - n + 1))
