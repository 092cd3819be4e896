"""Continuations of prompts of text: one, printed while it is generated, or a file of them in batches."""

import codecs
import dataclasses
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from calm.data.text import (
    ContinuationDecoder,
    decode_continuation,
    encode_plain_text,
    encode_plain_texts,
    half_character,
)
from calm.generation.model_runner import Continuations, ModelRunner, model_runner
from calm.generation.prompts import left_padded
from calm.generation.sampling_params import SamplingParams
from calm.models.context import positions_needed
from calm.utils.files import only_writer

# The fields of a line of results beside those of its prompt.
_RESULTS = {"text", "tokens", "tokens_per_second", "samples_per_patch", "decoded_per_token", "settings"}


def complete(
    model: PreTrainedModel | ModelRunner,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str | list[int]],
    params: SamplingParams,
    streamer: BaseStreamer | None = None,
    first: int = 0,
    compile: bool = False,
) -> list[dict]:
    """Continue prompts together.

    Args:
        model: a model, or a runner of one.
        prompts: texts, or token ids.
        params: default seed 0.
        first: number of the first prompt. With CALM, prompt i has the random numbers of ``seed + i``, whatever it is
            batched with.
        compile: as in ``generate`` of a CALM.

    Returns:
        for every prompt its ``text`` and ``tokens`` (without what follows the end of text), the ``tokens_per_second``
        of all prompts together and, for CALM, ``samples_per_patch`` and ``decoded_per_token``.
    """
    runner = model_runner(model)
    rows = _encode(tokenizer, prompts, runner)
    ids, mask = left_padded(rows, tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0)
    ids, mask = ids.to(runner.device), mask.to(runner.device)
    started = time.perf_counter()
    new, out = continue_tokens(model, tokenizer, ids, mask, params, streamer, first, compile)
    seconds = time.perf_counter() - started
    results = [
        {
            "text": decode_continuation(tokenizer, prompt, tokens),
            "tokens": len(tokens),
            "tokens_per_second": round(sum(map(len, new)) / seconds, 1),
        }
        for prompt, tokens in zip(rows, new, strict=True)
    ]
    if out.num_samples is not None and out.num_decoded is not None:
        for result, num_samples, num_decoded in zip(results, out.num_samples, out.num_decoded, strict=True):
            patches = int((num_decoded > 0).sum())
            result["samples_per_patch"] = round(int(num_samples.sum()) / patches, 2)
            result["decoded_per_token"] = round(int(num_decoded.sum()) / (patches * runner.patch_size), 2)
    return results


def continue_tokens(
    model: PreTrainedModel | ModelRunner,
    tokenizer: PreTrainedTokenizerBase,
    ids: torch.Tensor,
    mask: torch.Tensor,
    params: SamplingParams,
    streamer: BaseStreamer | None = None,
    first: int = 0,
    compile: bool = False,
) -> tuple[list[list[int]], Continuations]:
    """Continue token ids ``[prompts, T]`` as :func:`complete` does.

    Returns:
        the new tokens of every prompt up to their end, and the output of the model.
    """
    numbered = dataclasses.replace(params, seed=(params.seed or 0) + first)
    runner = model_runner(model)
    out = runner.generate(ids, mask, numbered, tokenizer, streamer, compile)
    return [until_end(row, tokenizer, runner.model) for row in out.tokens.tolist()], out


def complete_file(
    model: PreTrainedModel | ModelRunner,
    tokenizer: PreTrainedTokenizerBase,
    source: str | os.PathLike,
    output: str | os.PathLike,
    params: SamplingParams,
    batch_size: int = 8,
    advance: Callable[[int, int], None] | None = None,
    compile: bool = False,
) -> int:
    """Continue the ``prompt`` of every line of a JSONL file; a run that was killed resumes where it was.

    Args:
        output: file of the lines in order, with the results of :func:`complete` and the settings added.
        advance: called with the number of finished lines and of all lines.

    Returns:
        number of lines.
    """
    runner = model_runner(model)
    resolved = runner.resolve(params)  # a mistake shows before anything is written
    numbered, output = _read_prompts(source), Path(output)
    records = [record for _, record in numbered]
    _check_absent(output)
    prompts = encode_plain_texts(tokenizer, [record["prompt"] for record in records])
    _check_lengths(runner, [number for number, _ in numbered], prompts, source, resolved)
    draft = output.with_name(f".{output.name}.partial")
    settings = {"model": str(getattr(runner.model, "name_or_path", ""))} | params.given()
    settings |= {"stop": list(params.stop)} if params.stop else {}
    settings.pop("seed", None)
    settings |= runner.settings(batch_size)
    output.parent.mkdir(parents=True, exist_ok=True)
    with only_writer(output):
        _check_absent(output)  # another process may have finished it meanwhile
        _fill(draft, model, tokenizer, records, prompts, params, settings, batch_size, advance, compile)
        draft.replace(output)
    return len(records)


def _check_absent(output: Path) -> None:
    if output.exists():
        raise ValueError(f"{output} exists already: choose another file, or remove it.")


def _fill(
    draft: Path,
    model: PreTrainedModel | ModelRunner,
    tokenizer: PreTrainedTokenizerBase,
    records: list[dict],
    prompts: list[list[int]],
    params: SamplingParams,
    settings: dict[str, Any],
    batch_size: int,
    advance: Callable[[int, int], None] | None,
    compile: bool,
) -> None:
    """Add the missing lines to an unfinished output."""
    seed = params.seed or 0
    done = _finished_lines(draft, records, settings, seed)
    for start in range(done, len(records), batch_size):
        if advance is not None:
            advance(start, len(records))
        batch = records[start : start + batch_size]
        results = complete(model, tokenizer, prompts[start : start + batch_size], params, first=start, compile=compile)
        with draft.open("a", encoding="utf-8") as file:
            for number, (record, result) in enumerate(zip(batch, results, strict=True), start=start):
                line = record | result | {"settings": settings | {"seed": seed + number}}
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
    if not records:
        draft.touch()
    if advance is not None:
        advance(len(records), len(records))


def _check_lengths(
    runner: ModelRunner,
    numbers: list[int],
    prompts: list[list[int]],
    source: str | os.PathLike,
    params: SamplingParams,
) -> None:
    """Raise ValueError for a prompt that does not fit the model's context, before any text is written."""
    if runner.context is None:
        return
    max_new_tokens = params.max_new_tokens
    assert max_new_tokens is not None
    for number, prompt in zip(numbers, prompts, strict=True):
        if positions_needed(len(prompt), max_new_tokens, runner.patch_size) > runner.context:
            raise ValueError(
                f"{source} line {number}: a prompt of {len(prompt)} tokens and max_new_tokens="
                f"{max_new_tokens} do not fit the model's context of {runner.context * runner.patch_size} tokens: "
                "shorten the prompt, or request fewer."
            )


def _encode(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str | list[int]], runner: ModelRunner
) -> list[list[int]]:
    """Return the ids of every prompt; an empty prompt of a token model is its end-of-text token."""
    for prompt in prompts:
        if isinstance(prompt, str) and (index := half_character(prompt)) is not None:
            raise ValueError(f"the prompt {prompt!r:.60} is not UTF-8 text (character {index}).")
    rows = [encode_plain_text(tokenizer, prompt) if isinstance(prompt, str) else list(prompt) for prompt in prompts]
    # An empty prompt of a token model is a separator; generate() of a CALM aligns its prompts itself.
    return rows if runner.kind == "calm" else [runner.whole_patches(row) for row in rows]


class PrintingStreamer(BaseStreamer):
    """Print a prompt and its continuation while ``generate`` runs, without control tokens."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self._decoder = ContinuationDecoder(tokenizer)

    def put(self, value: torch.Tensor) -> None:
        print(self._decoder.add(value.flatten().tolist()), end="", flush=True)

    def end(self) -> None:
        print(self._decoder.add([], last=True), flush=True)


def until_end(tokens: list[int], tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel | None = None) -> list[int]:
    """Return tokens without the end of text (the tokenizer's or one of the model's) and what follows it, and without
    the padding after a text that ended otherwise."""
    saved: Any = None if model is None else model.generation_config.eos_token_id
    ends = {tokenizer.eos_token_id, *(saved if isinstance(saved, list) else [saved])}
    stop = next((index for index, token in enumerate(tokens) if token in ends), len(tokens))
    while stop and tokens[stop - 1] == tokenizer.pad_token_id:
        stop -= 1
    return tokens[:stop]


def _read_prompts(source: str | os.PathLike) -> list[tuple[int, dict]]:
    """Return the records of a file, with the numbers of their lines."""
    records = []
    for number, line in _lines(Path(source)):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{source} line {number} is not JSON: {error}.") from error
        if not isinstance(record, dict) or not isinstance(record.get("prompt"), str):
            raise ValueError(
                f'{source} line {number} has no text "prompt": every line must be like {{"prompt": "Once"}}.'
            )
        if half_character(json.dumps(record, ensure_ascii=False)) is not None:
            raise ValueError(f"{source} line {number} has half of a surrogate pair, which is not text.")
        if replaced := _RESULTS & record.keys():
            raise ValueError(
                f"{source} line {number} has a field {min(replaced)!r}, which the result would replace: rename it."
            )
        records.append((number, record))
    return records


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    for number, line in enumerate(path.read_bytes().removeprefix(codecs.BOM_UTF8).splitlines(), start=1):
        try:
            text = line.decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} line {number} is not UTF-8 text: {error.reason}.") from error
        if text.strip():
            yield number, text


def _finished_lines(draft: Path, records: list[dict], settings: dict, seed: int) -> int:
    """Return the number of complete lines of an unfinished output; an incomplete line is removed from it."""
    if not draft.exists():
        return 0
    lines = draft.read_bytes().splitlines(keepends=True)
    whole = [line for line in lines if line.endswith(b"\n")]
    for number, line in enumerate(whole):
        record = json.loads(line)
        same = number < len(records) and records[number].items() <= record.items()
        if not same or record["settings"] != settings | {"seed": seed + number}:
            raise ValueError(
                f"{draft} is the unfinished output of other prompts or settings: resume with those, or remove it."
            )
    draft.write_bytes(b"".join(whole))
    return len(whole)
