"""Prompts and responses for fine-tuning: the loss is on the responses alone.

An example stands in a block as generation will meet it: separators in front of the prompt until it ends on a patch
boundary (:mod:`calm.generation.prompts`), then the response, a separator, and more of them until the patch is full.
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

from calm.data.blocks import MANIFEST, check_block_size, check_ids, read_manifest
from calm.data.chat_templates import ChatTemplateLimitError
from calm.data.checksums import CHUNK_BYTES, DamagedDataError, file_checksums
from calm.data.documents import BadRecordError, field_names, read_records
from calm.data.output import find_prepared
from calm.data.sources import find_sources, unread_summary
from calm.data.text import encode_rendered, escape_control_tokens, half_character, render_chat
from calm.data.tokenizer import tokenizer_hash
from calm.utils.files import only_writer, put_in_place, staging_of

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
    unread: list[str] = []
    files = find_sources(sources, split, subset, unread)
    settings: dict[str, Any] = {
        "kind": "conversations",
        "sources": [{"path": file.path, "bytes": file.size} for file in files],
        "on_bad": on_bad,
        "seed": seed,
        "tokenizer_sha256": tokenizer_hash(tokenizer),
    }
    with only_writer(output):
        prepared = find_prepared(output, sources, settings)
        if prepared is not None:
            return prepared
        return _prepare(sources, tokenizer, output, settings, unread)


def _prepare(
    sources: Sequence[str | os.PathLike],
    tokenizer: PreTrainedTokenizerBase,
    output: Path,
    settings: dict[str, Any],
    unread: list[str],
) -> dict:
    counts: Counter = Counter()
    skipped: dict[str, str] = {}
    paths, on_bad, seed = [file["path"] for file in settings["sources"]], settings["on_bad"], settings["seed"]
    records = read_records(paths, partial(_exchanges, tokenizer=tokenizer), on_bad, counts, skipped)
    pairs = (pair for exchanges in records for pair in exchanges)
    dtype = np.dtype(np.uint32 if len(tokenizer) > 2**16 else np.uint16)
    tokens: list[np.ndarray] = []
    lengths: list[tuple[int, int]] = []
    while batch := list(islice(pairs, _BATCH_SIZE)):
        prompts, responses = (encode_rendered(tokenizer, texts) for texts in zip(*batch, strict=True))
        for prompt, response in zip(prompts, responses, strict=True):
            tokens.append(np.array(prompt + response, dtype))
            lengths.append((len(prompt), len(response)))
    if not lengths:
        raise ValueError(f"no prompts and responses in {', '.join(map(str, sources))}.")

    order = np.random.default_rng(seed).permutation(len(lengths))
    draft = staging_of(output)
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
        "chunk_bytes": CHUNK_BYTES,
        "files": [{"name": _TOKENS, "num_tokens": num_tokens, "checksums": file_checksums(draft / _TOKENS)}],
        "other_files": [{"name": _LENGTHS, "checksums": file_checksums(draft / _LENGTHS)}],
        "unread": unread_summary(unread),
    }
    (draft / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    put_in_place(draft, output)
    return manifest


def _exchanges(
    record: dict[str, Any], place: str, tokenizer: PreTrainedTokenizerBase
) -> list[tuple[str, str]] | BadRecordError:
    """Return the prompts and responses of a record, as texts for ``encode_rendered``."""
    if record.get("messages"):
        return _turns(record["messages"], place, tokenizer)
    # Tables that were merged have all their columns in every row: a null is no answer.
    answers = [answer for answer in (record.get("response"), record.get("completion")) if answer is not None]
    prompt, response = record.get("prompt"), next(filter(None, answers), answers[0] if answers else None)
    if not isinstance(prompt, str) or not isinstance(response, str):
        problem = f"holds neither messages nor the texts prompt and response (found: {field_names(record)})."
        return BadRecordError(place, problem, "no prompt and response")
    if half_character(prompt + response) is not None:
        return BadRecordError(place, "holds half of a surrogate pair.", "not UTF-8 text")
    if not response:
        return BadRecordError(place, "has an empty response.", "empty response")
    return [(escape_control_tokens(tokenizer, prompt), escape_control_tokens(tokenizer, response))]


def _turns(messages: Any, place: str, tokenizer: PreTrainedTokenizerBase) -> list[tuple[str, str]] | BadRecordError:
    if tokenizer.chat_template is None:
        # What every record would meet is no bad record.
        raise ValueError(f"{place} holds messages, and the tokenizer has no chat template to write them with.")
    good = isinstance(messages, list) and all(
        isinstance(message, dict) and isinstance(message.get("role"), str) for message in messages
    )
    if not good:
        return BadRecordError(place, "has messages that are no list of role and content.", "bad messages")
    if half_character(json.dumps(messages, ensure_ascii=False, default=str)) is not None:
        return BadRecordError(place, "holds half of a surrogate pair.", "not UTF-8 text")
    texts = [_text_of_content(message.get("content")) for message in messages]
    if None in texts:
        problem = "has a message whose content is neither a text nor a list of text parts."
        return BadRecordError(place, problem, "bad messages")
    messages = [message | {"content": text} for message, text in zip(messages, texts, strict=True)]
    turns = []
    for index, message in enumerate(messages):
        if message["role"] != "assistant" or not (message["content"] or message.get("tool_calls")):
            continue  # an answer without text teaches nothing, and is context for the next one
        try:
            prompt = render_chat(tokenizer, messages[:index], add_generation_prompt=True)
            whole = render_chat(tokenizer, messages[: index + 1])
        except ChatTemplateLimitError as error:
            # What every record would meet is no bad record.
            raise ValueError(f"{place}: {error}") from error
        except ValueError as error:
            return BadRecordError(place, f"does not suit the chat template ({error}).", "bad messages")
        if not whole.startswith(prompt):
            problem = "is written by the chat template so that a response does not follow its prompt."
            return BadRecordError(place, problem, "bad messages")
        turns.append((prompt, whole[len(prompt) :]))
    return turns or BadRecordError(place, "has no message of the role assistant with a text.", "bad messages")


def _text_of_content(content: Any) -> str | None:
    """Return the text of a message's content: a text, null, or parts of type text; None for anything else."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        return None
    texts = []
    for part in content:
        if not isinstance(part, dict) or part.get("type", "text") != "text" or not isinstance(part.get("text"), str):
            return None
        texts.append(part["text"])
    return "".join(texts)


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
        self.lengths = _read_lengths(self.path / _LENGTHS, self.manifest)
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
        tokens = self._tokens[self._starts[example] : self._starts[example + 1]].astype(np.int64)
        check_ids(tokens, self.manifest, f"{self.path} (example {example})")
        ids = torch.from_numpy(tokens)
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


def _read_lengths(path: Path, manifest: dict[str, Any]) -> np.ndarray:
    """Return the tokens of every prompt and response; DamagedDataError where they are not those of the manifest."""
    try:
        lengths = np.load(path)
    except (OSError, ValueError, EOFError) as error:
        raise DamagedDataError(f"{path} cannot be read ({error!r:.200}); run `calm prepare` again.") from error
    good = lengths.ndim == 2 and lengths.shape[1] == 2 and lengths.dtype.kind == "i" and bool((lengths >= 0).all())
    if not good or int(lengths.sum()) != manifest["num_tokens"]:
        raise DamagedDataError(f"{path} is damaged: it does not fit its manifest; run `calm prepare` again.")
    return lengths


def _fill(patches: np.ndarray, room: int) -> Iterator[int]:
    """The first example of every block, and the end; an example that is too long fills a block alone."""
    free = 0
    for example, needed in enumerate(patches.tolist()):
        if needed > free:
            yield example
            free = room
        free -= needed
    yield len(patches)
