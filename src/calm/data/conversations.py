"""Prompts and responses for fine-tuning: the loss is on the responses alone.

An example stands in a block as generation will meet it: separators in front of the prompt until it ends on a patch
boundary (:mod:`calm.models.prompts`), then the response, a separator, and more of them until the patch is full.
"""

import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from calm.data.blocks import MANIFEST, check_block_size, read_manifest
from calm.data.documents import BadRecordError, read_records
from calm.data.output import draft_of, find_prepared, put_in_place
from calm.data.sources import find_sources
from calm.data.text import half_character
from calm.data.tokenizer import tokenizer_hash

_TOKENS, _LENGTHS = "examples.ds", "lengths.npy"
_IGNORED = -100
_BATCH_SIZE = 1000


def prepare_conversations(
    sources: Sequence[str | os.PathLike],
    tokenizer: PreTrainedTokenizerBase,
    output: str | os.PathLike,
    on_bad: str = "error",
    seed: int = 0,
    split: str | None = None,
    subset: str | None = None,
) -> dict:
    """Tokenise prompts and responses into ``output``, in a shuffled order.

    Records (JSON lines or parquet) hold ``prompt`` and ``response`` (or ``completion``), or ``messages``: a list of
    ``role`` and ``content``, for which the tokenizer needs a chat template. Each message of the role ``assistant`` is
    the response to everything before it.

    Returns:
        the manifest.
    """
    output = Path(output)
    counts: Counter = Counter()
    skipped: dict[str, str] = {}
    files = find_sources(sources, split, subset)
    settings: dict[str, Any] = {
        "kind": "conversations",
        "sources": [{"path": file.path, "bytes": file.size} for file in files],
        "on_bad": on_bad,
        "seed": seed,
        "tokenizer_sha256": tokenizer_hash(tokenizer),
    }
    prepared = find_prepared(output, sources, settings)
    if prepared is not None:
        return prepared
    paths = [file.path for file in files]
    records = read_records(paths, partial(_exchanges, tokenizer=tokenizer), on_bad, counts, skipped)
    pairs = (pair for exchanges in records for pair in exchanges)
    dtype = np.dtype(np.uint32 if len(tokenizer) > 2**16 else np.uint16)
    tokens: list[np.ndarray] = []
    lengths: list[tuple[int, int]] = []
    while batch := list(islice(pairs, _BATCH_SIZE)):
        prompts, responses = (_encode(tokenizer, texts) for texts in zip(*batch, strict=True))
        for prompt, response in zip(prompts, responses, strict=True):
            tokens.append(np.array(prompt + response, dtype))
            lengths.append((len(prompt), len(response)))
    if not lengths:
        raise ValueError(f"no prompts and responses in {', '.join(map(str, sources))}.")

    order = np.random.default_rng(seed).permutation(len(lengths))
    draft = draft_of(output)
    shutil.rmtree(draft, ignore_errors=True)
    tokenizer.save_pretrained(draft / "tokenizer")
    np.concatenate([tokens[index] for index in order]).tofile(draft / _TOKENS)
    np.save(draft / _LENGTHS, np.array(lengths, np.int64)[order])
    num_tokens = sum(map(sum, lengths))
    manifest = settings | {
        "num_examples": len(lengths),
        "num_tokens": num_tokens,
        "num_response_tokens": sum(response for _, response in lengths),
        "skipped": {kind: {"count": counts[f"skipped: {kind}"], "first": first} for kind, first in skipped.items()},
        "vocab_size": len(tokenizer),
        "eos_token_id": tokenizer.eos_token_id,
        "token_bytes": dtype.itemsize,
        "files": [{"name": _TOKENS, "num_tokens": num_tokens}],
    }
    (draft / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    put_in_place(draft, output)
    return manifest


def _encode(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    return tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]


def _exchanges(
    record: dict[str, Any], place: str, tokenizer: PreTrainedTokenizerBase
) -> list[tuple[str, str]] | BadRecordError:
    """The prompts and responses of a record, as text."""
    if record.get("messages") is not None:
        return _turns(record["messages"], place, tokenizer)
    prompt, response = record.get("prompt"), record.get("response", record.get("completion"))
    if not isinstance(prompt, str) or not isinstance(response, str):
        problem = f"holds neither messages nor the texts prompt and response (found: {', '.join(record)})."
        return BadRecordError(place, problem, "no prompt and response")
    if half_character(prompt + response) is not None:
        return BadRecordError(place, "holds half of a surrogate pair.", "not UTF-8 text")
    if not response:
        return BadRecordError(place, "has an empty response.", "empty response")
    return [(prompt, response)]


def _turns(messages: Any, place: str, tokenizer: PreTrainedTokenizerBase) -> list[tuple[str, str]] | BadRecordError:
    if tokenizer.chat_template is None:
        # What every record would meet is no bad record.
        raise ValueError(f"{place} holds messages, and the tokenizer has no chat template to write them with.")
    good = isinstance(messages, list) and all(
        isinstance(message, dict) and isinstance(message.get("role"), str) and isinstance(message.get("content"), str)
        for message in messages
    )
    if not good:
        return BadRecordError(place, "has messages that are no list of role and content.", "bad messages")
    if any(half_character(message["content"]) is not None for message in messages):
        return BadRecordError(place, "holds half of a surrogate pair.", "not UTF-8 text")
    turns = []
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        try:
            prompt = str(tokenizer.apply_chat_template(messages[:index], tokenize=False, add_generation_prompt=True))
            whole = str(tokenizer.apply_chat_template(messages[: index + 1], tokenize=False))
        except Exception as error:  # templates raise what they like
            return BadRecordError(place, f"does not suit the chat template ({error}).", "bad messages")
        if not whole.startswith(prompt):
            problem = "is written by the chat template so that a response does not follow its prompt."
            return BadRecordError(place, problem, "bad messages")
        turns.append((prompt, whole[len(prompt) :]))
    return turns or BadRecordError(place, "has no message of the role assistant.", "bad messages")


class ConversationBlocks(Dataset):
    """Blocks of ``block_size`` tokens filled with whole examples, one behind the other.

    An item holds ``input_ids`` and ``labels``, int64 ``[block_size]``; labels are -100 outside the responses. Of an
    example that is longer than a block the front of the prompt is left out, and what then remains of the response.

    Args:
        path: a directory made by ``calm prepare --conversations``.
        block_size: tokens per block, a multiple of ``patch_size``.
        patch_size: K of the model that reads them; 1 for a token model.
        separator_id: the token in front of prompts and behind responses; default the end-of-text token. It must be one
            that the model's autoencoder met between the documents it was trained on.
    """

    def __init__(self, path: str | os.PathLike, block_size: int, patch_size: int = 1, separator_id: int | None = None):
        check_block_size(block_size, patch_size)
        if block_size < 2 * patch_size:
            raise ValueError(f"block_size must hold a prompt and a response, 2 patches of {patch_size}: {block_size}.")
        self.path, self.block_size, self.patch_size = Path(path), block_size, patch_size
        self.manifest = read_manifest(path)
        self.separator_id = self.manifest["eos_token_id"] if separator_id is None else separator_id
        self.lengths = np.load(self.path / _LENGTHS)
        self._starts = np.concatenate([[0], self.lengths.sum(1).cumsum()])
        # The model has to end, so that a response is followed by at least one separator.
        patches = np.maximum(1, -(-self.lengths[:, 0] // patch_size)) + self.lengths[:, 1] // patch_size + 1
        self.num_cut = int((patches > block_size // patch_size).sum())
        self._first_example = list(_fill(patches, block_size // patch_size))

    def __len__(self) -> int:
        return len(self._first_example) - 1

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if not 0 <= index < len(self):
            raise IndexError(f"block {index} of {len(self)}")
        ids = torch.full((self.block_size,), self.separator_id)
        labels = torch.full((self.block_size,), _IGNORED)
        start = 0
        for example in range(*self._first_example[index : index + 2]):
            prompt, response = self._example(example)
            middle = start + len(prompt)
            ids[start:middle] = prompt
            ids[middle : middle + len(response)] = labels[middle : middle + len(response)] = response
            start = middle + len(response)
        return {"input_ids": ids, "labels": labels}

    def _example(self, example: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Prompt and response in whole patches, together at most a block."""
        size, (num_prompt, _) = self.patch_size, self.lengths[example]
        ids = torch.from_numpy(self._tokens[self._starts[example] : self._starts[example + 1]].astype(np.int64))
        prompt, response = ids[:num_prompt], ids[num_prompt:]
        response = torch.nn.functional.pad(response, (0, size - len(response) % size), value=self.separator_id)
        room = max(self.block_size - len(response), size)
        prompt = prompt[-room:]
        fill = -len(prompt) % size if len(prompt) else size
        return torch.nn.functional.pad(prompt, (fill, 0), value=self.separator_id), response[: self.block_size - room]

    @cached_property
    def _tokens(self) -> np.ndarray:
        dtype = {2: np.uint16, 4: np.uint32}[self.manifest["token_bytes"]]
        return np.memmap(self.path / _TOKENS, dtype=dtype, mode="r")

    def __getstate__(self) -> dict:
        # Workers map the file themselves.
        return {name: value for name, value in self.__dict__.items() if name != "_tokens"}


def _fill(patches: np.ndarray, room: int) -> Iterator[int]:
    """The first example of every block, and the end; an example that is too long fills a block alone."""
    free = 0
    for example, needed in enumerate(patches.tolist()):
        if needed > free:
            yield example
            free = room
        free -= needed
    yield len(patches)
