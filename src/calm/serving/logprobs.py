"""Log-probabilities of tokens in the formats of OpenAI's two endpoints."""

import math
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from calm.serving.jobs import TokenLogprob

_IMPOSSIBLE = -9999.0  # stands for a probability of 0, as in OpenAI's API: JSON has no infinity


def chat_logprobs(tokenizer: PreTrainedTokenizerBase, logprobs: Sequence[TokenLogprob]) -> dict[str, Any]:
    """Return the ``logprobs`` of a choice of the chat endpoint."""
    content = [
        _entry(tokenizer, each.token, each.logprob)
        | {"top_logprobs": [_entry(tokenizer, token, logprob) for token, logprob in each.top]}
        for each in logprobs
    ]
    return {"content": content, "refusal": None}


def completion_logprobs(
    tokenizer: PreTrainedTokenizerBase, logprobs: Sequence[TokenLogprob], offset: int
) -> dict[str, Any]:
    """Return the ``logprobs`` of a choice of the completions endpoint.

    Args:
        offset: characters of the tokens before these.
    """
    tokens = [_text(tokenizer, each.token) for each in logprobs]
    offsets = [offset + sum(map(len, tokens[:index])) for index in range(len(tokens))]
    top = [
        {_text(tokenizer, token): _finite(logprob) for token, logprob in [*each.top, (each.token, each.logprob)]}
        for each in logprobs
    ]
    return {
        "tokens": tokens,
        "token_logprobs": [_finite(each.logprob) for each in logprobs],
        "top_logprobs": top,
        "text_offset": offsets,
    }


def _entry(tokenizer: PreTrainedTokenizerBase, token: int, logprob: float) -> dict[str, Any]:
    text = _text(tokenizer, token)
    # A token may be a part of a character; then it has no text of its own.
    encoded = None if "\ufffd" in text else list(text.encode())
    return {"token": text, "logprob": _finite(logprob), "bytes": encoded}


def _text(tokenizer: PreTrainedTokenizerBase, token: int) -> str:
    return str(tokenizer.decode([token]))


def _finite(logprob: float) -> float:
    return logprob if math.isfinite(logprob) else _IMPOSSIBLE
