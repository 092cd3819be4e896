"""What a quickstart measures on its trained models: scores, speed, continuations and the round trip of one line."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from transformers import PreTrainedTokenizerBase

from calm.data.blocks import TokenBlocks
from calm.data.documents import read_documents
from calm.data.text import decode_continuation, encode_plain_text
from calm.evaluation.brier_lm import BrierResult, evaluate_brier
from calm.evaluation.ngram_baselines import evaluate_counts
from calm.generation.completions import continue_tokens
from calm.generation.model_runner import model_runner
from calm.generation.sampling_params import SamplingParams
from calm.models.context import patch_size_of
from calm.models.modeling_calm import CalmForCausalLM
from calm.models.modeling_codes import TokenCodes

MTP = "mtp"
# The scored rows: a model, its sampler at temperature 1, and its sampler for the continuations.
ROWS = {
    "CALM": ("calm", "batch", "direct"),
    "CALM, MTP decoding": ("calm", MTP, MTP),
    "baseline": ("baseline", None, None),
}
NGRAM_ROWS = {"bigram": 2, "unigram": 1}
PROBE_BLOCKS = 4  # scored first, to measure the seconds per block
EVALUATION_SAMPLES = 8
SAMPLE_TEMPERATURE = 0.5
SAMPLE_TOKENS = 64
PROMPTS = ("def __init__(self, ", "import os\n", "    for i in range(")
ROUND_TRIP_CHARACTERS = 60
SPEED_TOKENS, SPEED_BATCH = 128, 8


def score_rows(
    models: dict[str, Any],
    train_blocks: TokenBlocks,
    blocks: TokenBlocks,
    num_blocks: int,
    seed: int,
    progress: Progress,
) -> dict[str, dict]:
    """Return the Brier scores of all rows on the same held-out blocks."""
    brier = {}
    for row in ROWS:
        task = progress.add_task(f"score {row}", total=num_blocks, note="")
        advance = lambda done, task=task: progress.advance(task, done)  # noqa: E731
        brier[row] = _score(row, models, blocks, num_blocks, seed, advance).to_dict()
    stride = models["calm"].config.patch_size
    for row, order in NGRAM_ROWS.items():
        brier[row] = evaluate_counts(train_blocks, blocks, order, stride, num_blocks).to_dict()
    return brier


def seconds_per_block(models: dict[str, Any], blocks: TokenBlocks, clock: Callable[[], float]) -> float:
    """Return the seconds that one block takes in all rows together."""
    started = clock()
    for row in ROWS:
        _score(row, models, blocks, PROBE_BLOCKS, 0)
    return max(clock() - started, 1e-6) / min(PROBE_BLOCKS, len(blocks))


def _score(
    row: str,
    models: dict[str, Any],
    blocks: TokenBlocks,
    num_blocks: int,
    seed: int,
    advance: Callable[[int], None] | None = None,
) -> BrierResult:
    name, sampler, _ = ROWS[row]
    return evaluate_brier(
        models[name],
        blocks,
        models["calm"].config.patch_size,
        num_blocks=num_blocks,
        num_samples=EVALUATION_SAMPLES,
        seed=seed,
        advance=advance,
        sampler=sampler or "batch",
    )


def generation_speed(model: Any, blocks: TokenBlocks, sampler: str | None) -> float:
    """Tokens per second at temperature 1, a batch of prompts, the median of three runs."""
    prompts = torch.stack([blocks[index]["input_ids"][:64] for index in range(SPEED_BATCH)]).to(model.device)
    params = SamplingParams(1.0, sampler, top_p=1.0, max_new_tokens=SPEED_TOKENS)
    runner, mask = model_runner(model), torch.ones_like(prompts)
    eos, pad = model.generation_config.eos_token_id, model.generation_config.pad_token_id
    model.generation_config.eos_token_id = None  # every row runs to the end
    model.generation_config.pad_token_id = 0
    rates = []
    for _ in range(4):
        started = time.perf_counter()
        runner.generate(prompts, mask, params)
        rates.append(SPEED_BATCH * SPEED_TOKENS / (time.perf_counter() - started))
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = eos, pad
    return sorted(rates[1:])[1]


def sample_rows(models: dict[str, Any], tokenizer: PreTrainedTokenizerBase, seed: int) -> list[dict]:
    """Return the first continuation of every prompt by every row, at one temperature."""
    samples = []
    for prompt in PROMPTS:
        ids = encode_plain_text(tokenizer, prompt)
        for row, (name, _, sampler) in ROWS.items():
            model = models[name]
            params = SamplingParams(SAMPLE_TEMPERATURE, sampler, max_new_tokens=SAMPLE_TOKENS, seed=seed)
            prompt_ids = torch.tensor([ids], device=model.device)
            (new,), _ = continue_tokens(model, tokenizer, prompt_ids, torch.ones_like(prompt_ids), params)
            samples.append(
                {
                    "model": row,
                    "sampler": sampler,
                    "temperature": SAMPLE_TEMPERATURE,
                    "prompt": prompt,
                    "text": decode_continuation(tokenizer, ids, new),
                }
            )
    return samples


def first_line(corpus: Path) -> str:
    """Return a line of held-out text that is long enough to show."""
    for text in read_documents([str(corpus)]):
        for line in text.splitlines():
            if len(line) >= ROUND_TRIP_CHARACTERS and line.strip().startswith(("def ", "if ", "return ", "self.")):
                return line.strip()
    return "def __init__(self, value): self.value = value"


@torch.no_grad()
def round_trip(model: CalmForCausalLM, tokenizer: PreTrainedTokenizerBase, line: str) -> dict:
    """Encode one line of text as vectors and decode the vectors.

    Returns:
        ``patches``: the text of every patch; ``vector``: the vector of the first patch; ``decoded``: the text that the
        vectors decode to; ``num_tokens`` and ``num_correct``: how many tokens there are and how many come back.
    """
    patch_size = patch_size_of(model.config)
    ids = encode_plain_text(tokenizer, line)
    ids = ids[: len(ids) // patch_size * patch_size]
    latents = model.autoencoder.encode(torch.tensor([ids], device=model.device)).mean
    decoded = model.autoencoder.decode(latents).argmax(-1).flatten().tolist()
    return {
        "kind": "code table" if isinstance(model.autoencoder, TokenCodes) else "autoencoder",
        "patches": [tokenizer.decode(ids[first : first + patch_size]) for first in range(0, len(ids), patch_size)],
        "vector": [round(value, 2) for value in latents[0, 0].tolist()],
        "decoded": tokenizer.decode(decoded),
        "num_tokens": len(ids),
        "num_correct": sum(token == back for token, back in zip(ids, decoded, strict=True)),
    }
